# SPDX-License-Identifier: LGPL-2.1-or-later
"""The two architectures differ in a handful of names: they are all here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """One architecture the rig can boot.

    Attributes:
        name: as the kernel, QEMU's program names and the rig's command line say it.
        debian: Debian's name for it.
        multiarch: the triplet in Debian's library paths.
        gcc: the tool root's compiler for it.
        kernel_package: dom0's kernel, and the Linux guests'.
        xen_package: the hypervisor.
        disk_modules: what the initramfs must load to see the disks and the root file system.
        device_model: Debian's package of a device model for Xen's guests, where it has one.
        configured: whether the packages' configuration scripts can run when the image is built;
            a foreign root is only unpacked, which is all a test machine needs.
    """

    name: str
    debian: str
    multiarch: str
    gcc: str
    kernel_package: str
    xen_package: str
    disk_modules: tuple[str, ...]
    device_model: tuple[str, ...]
    configured: bool


X86_64 = Arch(
    name="x86_64",
    debian="amd64",
    multiarch="x86_64-linux-gnu",
    gcc="x86_64-linux-gnu-gcc",
    kernel_package="linux-image-amd64",
    xen_package="xen-hypervisor-4.20-amd64",
    disk_modules=("virtio_pci", "virtio_blk", "crc32c_generic", "ext4"),
    device_model=("qemu-system-xen",),
    configured=True,
)
ARM64 = Arch(
    name="arm64",
    debian="arm64",
    multiarch="aarch64-linux-gnu",
    gcc="aarch64-linux-gnu-gcc",
    kernel_package="linux-image-arm64",
    xen_package="xen-hypervisor-4.20-arm64",
    disk_modules=("virtio_mmio", "virtio_blk", "crc32c_generic", "ext4"),
    device_model=(),
    configured=False,
)
ARCHES = {arch.name: arch for arch in (X86_64, ARM64)}


def arch_named(name: str) -> Arch:
    """The architecture called `name`.

    Raises:
        ValueError: there is none; the message says which there are.
    """
    try:
        return ARCHES[name]
    except KeyError:
        raise ValueError(f"no such architecture: {name} (try {' or '.join(ARCHES)})") from None
