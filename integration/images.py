# SPDX-License-Identifier: LGPL-2.1-or-later
"""A test on real Xen needs a disk with dom0 on it, and Xen and a kernel to start: made here, once.

Both architectures get Debian 13 from its own packages. Nothing of xshmd is in an image: that is
the payload's, so that a change to xshmd never builds an image again.
"""

from __future__ import annotations

import gzip
import inspect
import lzma
import shutil
from dataclasses import dataclass
from pathlib import Path

from integration.arch import Arch
from integration.cache import Cache, Entry, Recipe
from integration.debian import SUITE, unpack_debian
from integration.toolroot import ToolRoot

HERE = Path(__file__).parent
XEN_VERSION = "4.20"
DISK_SIZE = "2G"
DOM0_PACKAGES = (
    # essential packages take these for granted; an unpacked root must be told
    "base-passwd",
    "mawk",
    "passwd",
    # Xen's own
    f"xen-utils-{XEN_VERSION}",
    "xenstore-utils",
    # an operating system around it
    "busybox-static",
    "dbus",
    "kmod",
    "procps",
    "strace",
    "systemd",
    "systemd-sysv",
    "udev",
    # what xshmd needs, and its tests
    "python3",
    "python3-cffi",
    "python3-hypothesis",
    "python3-libfdt",
    "python3-pytest",
    "python3-pytest-trio",
    "python3-pyxs",
    "python3-structlog",
    "python3-trio",
    "python3-varlink",
)
PLAIN = ""
LIBVIRT = "libvirt"
VARIANTS = (PLAIN, LIBVIRT)
"""The names of the images there are of each architecture. The second has libvirt in dom0, and a
device model for guests that want a whole PC: much that only a few scenarios need.
"""
LIBVIRT_PACKAGES = ("libvirt-clients", "libvirt-daemon-driver-xen")


@dataclass(frozen=True)
class Image:
    """What QEMU needs to boot one architecture's dom0; all are files in the cache.

    Attributes:
        name: the architecture's, and which of its images this is.
        key: changes when the image does.
        root: an ext4 file system, dom0's root.
        xen: the hypervisor, as QEMU's -kernel wants it.
        kernel: dom0's kernel, as Xen wants it.
        initramfs: finds the disks, unpacks the payload over the root, starts the given init.
        guest_kernel: the kernel for Linux guests; also on the root, as /rig/vmlinuz.
        busybox: the static busybox of this architecture.
        modules: the kernel's version, which is also the folder's name below /usr/lib/modules.
    """

    name: str
    key: str
    root: Path
    xen: Path
    kernel: Path
    initramfs: Path
    guest_kernel: Path
    busybox: Path
    entry: Entry


def get_image(
    arch: Arch, tools: ToolRoot, cache: Cache | None = None, variant: str = PLAIN
) -> Image:
    """One of the images of `arch` from the cache, built first if need be."""
    name = f"{arch.name}-{variant}" if variant else arch.name
    packages = _packages(arch, variant)
    recipe = Recipe(
        f"image-{name}",
        f"the {name} dom0 image",
        2,
        (
            SUITE,
            XEN_VERSION,
            DISK_SIZE,
            repr(arch),
            *packages,
            (HERE / "dom0/initramfs-init").read_text(),
            Path(__file__).read_text(),
            inspect.getsource(unpack_debian),
        ),
    )
    entry = (cache or Cache()).get(recipe, lambda c, log: _build(arch, tools, packages, c, log))
    at = entry.path
    return Image(
        name=name,
        key=recipe.key,
        root=at / "root.img",
        xen=at / "xen",
        kernel=at / "kernel",
        initramfs=at / "initramfs",
        guest_kernel=at / "kernel",
        busybox=at / "busybox",
        entry=entry,
    )


def _packages(arch: Arch, variant: str) -> tuple[str, ...]:
    """What dom0 is to have; what that depends on comes with it."""
    more = (*LIBVIRT_PACKAGES, *arch.device_model) if variant == LIBVIRT else ()
    return (*DOM0_PACKAGES, arch.kernel_package, arch.xen_package, *more)


def _build(
    arch: Arch, tools: ToolRoot, packages: tuple[str, ...], content: Path, log: Path
) -> None:
    root = content / "root"
    root.mkdir(mode=0o755)
    if arch.configured:
        unpack_debian(arch, tools, root, "essential", packages, log)
    else:
        unpack_debian(arch, tools, root, "extract", ("?essential", *packages), log)
        _settle_unpacked(root)
    _boot_files(arch, tools, root, content, log)
    _finish_root(arch, tools, root, log)
    tools.run(
        [
            *("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0"),
            *("-d", "/rig/out/root", "/rig/out/root.img", DISK_SIZE),
        ],
        binds={content: "/rig/out"},
        log=log,
    )
    shutil.rmtree(root)


def _settle_unpacked(root: Path) -> None:
    """Do for a root that was only unpacked the few things its packages' scripts would have done."""
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / "etc" / name)
    (root / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    for link, target in (("var/run", "/run"), ("var/lock", "/run/lock")):
        path = root / link
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target)
    awk = root / "usr/bin/awk"
    if not awk.exists():
        awk.symlink_to("mawk")


def _boot_files(arch: Arch, tools: ToolRoot, root: Path, content: Path, log: Path) -> None:
    boot = root / "boot"
    name = f"xen-{XEN_VERSION}-{arch.debian}"
    hypervisor = next(p for p in (boot / name, boot / f"{name}.gz") if p.exists())
    kernel = next(boot.glob("vmlinuz-*"))
    _copy_unpacked(hypervisor, content / "xen")
    _copy_unpacked(kernel, content / "kernel")
    shutil.copy(root / "usr/bin/busybox", content / "busybox")
    modules = next((root / "usr/lib/modules").iterdir())
    tools.run(["depmod", "-b", "/rig/out/usr", modules.name], binds={root: "/rig/out"}, log=log)
    ramdisk = content / "ramdisk"
    for name in ("bin", "dev", "mods", "new", "proc", "sys"):
        (ramdisk / name).mkdir(parents=True)
    shutil.copy(root / "usr/bin/busybox", ramdisk / "bin/busybox")
    init = (HERE / "dom0/initramfs-init").read_text()
    order: list[str] = []
    for wanted in arch.disk_modules:
        for file in _with_dependencies(modules, wanted):
            name = file.name.partition(".ko")[0]
            if name not in order:
                order.append(name)
                (ramdisk / "mods" / f"{name}.ko").write_bytes(_module_bytes(file))
    init = init.replace("@MODULES@", " ".join(order))
    (ramdisk / "init").write_text(init)
    (ramdisk / "init").chmod(0o755)
    tools.run(
        ["sh", "-c", "cd /rig/out/ramdisk && find . | cpio -o -H newc | gzip > ../initramfs"],
        binds={content: "/rig/out"},
        log=log,
    )
    shutil.rmtree(ramdisk)


def _with_dependencies(modules: Path, wanted: str) -> list[Path]:
    """The files of a module and all it depends on, in the order to load them; [] if built in."""
    lines = (modules / "modules.dep").read_text().splitlines()
    dependencies = {head: tail.split() for head, _, tail in (s.partition(":") for s in lines)}
    by_name = {Path(p).name.partition(".ko")[0].replace("-", "_"): p for p in dependencies}
    path = by_name.get(wanted.replace("-", "_"))
    if path is None:
        return []
    return [modules / p for p in (*reversed(dependencies[path]), path)]


def _module_bytes(file: Path) -> bytes:
    data = file.read_bytes()
    return lzma.decompress(data) if file.suffix == ".xz" else data


def _copy_unpacked(source: Path, target: Path) -> None:
    """Copy, and unpack if it is compressed as a whole (QEMU and Xen take no .gz)."""
    data = source.read_bytes()
    target.write_bytes(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)


def _finish_root(arch: Arch, tools: ToolRoot, root: Path, log: Path) -> None:
    reach = root / "etc/resolv.conf"
    reach.unlink(missing_ok=True)
    reach.write_text("")
    (root / "etc/hostname").write_text("dom0\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost dom0\n")
    (root / "etc/fstab").write_text("")
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (root / "rig").mkdir()
    # oxenstored will not start without a place for its log
    (root / "var/log/xen/console").mkdir(parents=True, exist_ok=True)
    shutil.copy(next((root / "boot").glob("vmlinuz-*")), root / "rig/vmlinuz")
    if not arch.configured:  # an unpacked kernel is packed on arm64, and its guests take none such
        _copy_unpacked(root / "rig/vmlinuz", root / "rig/vmlinuz")
    for needless in ("boot", "var/cache/apt", "var/lib/apt", "usr/share/doc", "usr/share/locale"):
        shutil.rmtree(root / needless, ignore_errors=True)
    # Bytecode is the same on every architecture. Compiling in an emulated machine takes seconds.
    tools.run(
        [
            *("python3", "-m", "compileall", "-q", "-j", "0"),
            *("--invalidation-mode", "unchecked-hash", "-s", "/rig/out", "-x", "/test/"),
            *("/rig/out/usr/lib/python3", "/rig/out/usr/lib/python3.13"),
        ],
        binds={root: "/rig/out"},
        log=log,
    )
