# SPDX-License-Identifier: LGPL-2.1-or-later
"""What regions that guests map themselves can be, and on which hosts.

"security" in the sources below is reference/security.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from xshmd.machine import Arch, HostInfo
from xshmd.model import (
    DOMAIN_0,
    WHOLE_REGION,
    Backing,
    GuestConfig,
    Isolation,
    Transport,
)
from xshmd.policy.definitions import Definition, Said
from xshmd.policy.findings import Findings, refused, region_at
from xshmd.policy.host import security_module
from xshmd.policy.region_rules import Case


def grant_under_silo(config: GuestConfig, host: HostInfo) -> Findings:
    """Under SILO no guest maps what another domain but dom0 granted (security, section 3).

    xen/xsm/silo.c, silo_grant_mapref(); the module is Xen's own choice on Arm, where its
    configuration says so (xen/common/Kconfig, XSM_SILO_DEFAULT).
    """
    if config.name == DOMAIN_0 or security_module(host) != "silo":
        return
    how = "xsm=silo" if "xsm=silo" in host.xen_command_line.split() else "silo, its own choice,"
    yield refused(
        "grant-under-silo",
        config.requests[0].place,
        f"guest '{config.name}' is to map region '{config.requests[0].region_id}' from grants,"
        f" but this Xen runs with {how} and lets guests map grants of dom0 alone",
        "boot Xen with xsm=dummy on its command line, say transport=physmap, or for a region of one"
        " guest and dom0 backing=dom0",
    )


def grant_backing(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """Only a domain's own RAM can be granted (get_paged_frame(), common/grant_table.c)."""
    terms = definition.terms
    if terms.transport is Transport.GRANT and terms.backing is Backing.HOST:
        yield refused(
            "grant-backing",
            definition.place,
            f"region '{definition.region_id}' asks for transport=grant with backing=host, and"
            " memory of the host belongs to no domain that could grant it",
            "say transport=physmap, or leave the host address out",
        )


def lent_without_grant(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """Whoever has dom0's frames mapped for it needs dom0 as its target, and then has all of dom0.

    So a guest has them from grants of dom0's kernel, or not at all.
    """
    terms = definition.terms
    if terms.is_lent and terms.transport is not Transport.GRANT:
        yield refused(
            "lent-without-grant",
            definition.place,
            f"region '{definition.region_id}' asks for backing=dom0, and a guest can have dom0's"
            " own memory from grants alone",
            "say transport=grant as well if its guest can map grants, or leave backing=dom0 out",
        )


def lent_whole(case: Case) -> Findings:
    """dom0's kernel grants a page to one domain, so nobody else could have the rest."""
    definition, request = case.counts, case.request
    if definition is None or not definition.terms.is_lent:
        return
    if request.offset_frames or request.nr_frames not in (WHOLE_REGION, definition.nr_frames):
        yield refused(
            "lent-whole",
            request.place,
            f"{region_at(request)} is a part of dom0's own memory, which is lent as a whole",
            "leave offset and size out",
        )


def grant_sealed(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """Whoever maps a region itself cannot be sealed off from it, and need not be.

    Each member reaches what it was granted and nothing else, which is more than ``sealed`` says;
    but it may keep what it has mapped, which is less.
    """
    if (definition.terms.transport, definition.terms.isolation) == (
        Transport.GRANT,
        Isolation.SEALED,
    ):
        yield refused(
            "grant-sealed",
            definition.place,
            f"region '{definition.region_id}' asks for transport=grant with isolation=sealed, and"
            " what a guest has mapped by itself cannot be taken away while it runs",
            "say isolation=region, which grants keep, or transport=physmap",
        )


def region_without_grant(definition: Definition, said: Said, arch: Arch | None) -> Findings:
    """The holder of a share group is the target of its members (security, F4)."""
    terms = definition.terms
    if terms.isolation is Isolation.REGION and terms.transport is not Transport.GRANT:
        yield refused(
            "region-without-grant",
            definition.place,
            f"region '{definition.region_id}' asks for isolation=region, which xshmd cannot keep:"
            " the members of a share group can reach all of its regions while they run",
            "say transport=grant as well; or leave it out if the members may trust each other",
        )


HOST_RULES: Final[tuple[Callable[[GuestConfig, HostInfo], Findings], ...]] = (grant_under_silo,)
"""Those of a guest and a running Xen; the configuration has entries for such regions only."""
DEFINITION_RULES: Final[tuple[Callable[[Definition, Said, Arch | None], Findings], ...]] = (
    grant_backing,
    lent_without_grant,
    grant_sealed,
    region_without_grant,
)
"""Those for each definition of a region."""
REGION_RULES: Final[tuple[Callable[[Case], Findings], ...]] = (lent_whole,)
"""Those for each entry among all others."""
