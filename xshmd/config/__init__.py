# SPDX-License-Identifier: LGPL-2.1-or-later
"""What users write, read into records: each module one language, and the finder of the files."""
