# SPDX-License-Identifier: LGPL-2.1-or-later
"""Xen boots in QEMU only if a dozen things are said right: this is where, and why, they are said.

Each setting below that looks odd was found by a machine that crashed without it.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.agent import PORT_NAME
from integration.arch import Arch

# Where the machine's files are seen inside the tool root.
IMAGE = "/rig/image"
PAYLOAD = "/rig/payload.tar"
ARTEFACTS = "/rig/artefacts"
CONSOLE_LOG = "console.log"

PLAIN_BAR_MIB = 4
"""The size of the BAR that is plain memory: 2 of the device with the id 1af4:1110."""

# QEMU puts its device tree at 0x4800_0000 on `virt`: the boot modules keep clear of it.
_ARM64_KERNEL_AT = 0x5000_0000
_ARM64_INITRAMFS_AT = 0x5800_0000


@dataclass(frozen=True)
class Shape:
    """How large the machine is and what it boots into.

    Attributes:
        memory_mib: the whole machine's.
        dom0_memory_mib: dom0's share; guests and regions have the rest.
        smp: host CPUs. Dom0 has the first of them to itself.
        dom0_vcpus: how many those are.
        dom0: "pv" or, on x86_64, "pvh", which Xen wants an IOMMU for.
        init: "rig" (ready in seconds) or "systemd" (as on a real machine).
        xenstored: with init="rig" the store to start, "xenstored" (in C) or "oxenstored"; systemd
            starts Debian's choice, which is oxenstored.
        xen_args: added to Xen's command line.
        linux_args: added to dom0's kernel command line.
    """

    memory_mib: int = 3072
    dom0_memory_mib: int = 1024
    smp: int = 2
    dom0_vcpus: int = 1
    dom0: str = "pv"
    init: str = "rig"
    xenstored: str = "xenstored"
    xen_args: tuple[str, ...] = ()
    linux_args: tuple[str, ...] = ()


_DMA_API = "iommu_platform=on,disable-legacy=on"
_INITS = {"rig": "/rig/rig-init", "systemd": "/lib/systemd/systemd"}


def accelerator(arch: Arch) -> str:
    """What QEMU runs the machine with: "kvm" if Xen finds virtualisation inside, else "tcg".

    A /dev/kvm that opens is not enough: without vmx or svm, and nesting, Xen dies at its start.
    """
    if os.environ.get("XSHMD_ACCEL"):
        return os.environ["XSHMD_ACCEL"]
    if arch.name != "x86_64" or platform.machine() != "x86_64":
        return "tcg"  # nested virtualisation on Arm is too new to rely on
    flags = re.search(r"^flags\s*:.*\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text(), re.M)
    if not flags or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    module = {"vmx": "kvm_intel", "svm": "kvm_amd"}[flags.group(1)]
    nested = Path(f"/sys/module/{module}/parameters/nested")
    return "kvm" if nested.exists() and nested.read_text().strip() in ("1", "Y") else "tcg"


def command(arch: Arch, shape: Shape, *, channel_fd: int, kernel_bytes: int) -> list[str]:
    """QEMU's command line, with paths as they are inside the tool root.

    Args:
        arch: what to boot.
        shape: how large, and into what.
        channel_fd: QEMU's end of the command channel, a connected socket it inherits.
        kernel_bytes: the size of dom0's kernel, which must not run into what comes after it.
    """
    if shape.init not in _INITS:
        raise ValueError(f"init is {' or '.join(_INITS)}, not {shape.init}")
    accel = accelerator(arch)
    build = _x86_64 if arch.name == "x86_64" else _arm64
    machine = build(shape, accel)
    if arch.name == "arm64" and kernel_bytes > _ARM64_INITRAMFS_AT - _ARM64_KERNEL_AT:
        raise ValueError(f"a kernel of {kernel_bytes} bytes runs into the initramfs")
    return [
        *machine,
        *("-accel", "tcg,thread=multi" if accel == "tcg" else accel),
        *("-m", str(shape.memory_mib), "-smp", str(shape.smp)),
        # When Xen or dom0 panics it reboots, which ends QEMU, which is noticed at once.
        *("-no-reboot", "-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none"),
        # One image serves every boot: what dom0 writes is forgotten.
        *("-drive", f"file={IMAGE}/root.img,format=raw,if=none,id=root,snapshot=on"),
        *("-drive", f"file={PAYLOAD},format=raw,if=none,id=payload,snapshot=on"),
        *("-chardev", f"file,id=console,path={ARTEFACTS}/{CONSOLE_LOG}"),
        *("-serial", "chardev:console"),
        *("-chardev", f"socket,id=channel,fd={channel_fd}"),
        *("-device", f"virtserialport,chardev=channel,name={PORT_NAME}"),
        # A PCI device whose BAR is plain memory: what regions with the host backing are tried on.
        *("-object", f"memory-backend-ram,id=plain,size={PLAIN_BAR_MIB}M,share=on"),
        *("-device", "ivshmem-plain,memdev=plain"),
    ]


def _xen_args(shape: Shape, *own: str) -> str:
    """Xen's command line. All log levels: what guests say to the emulated port 0xE9 goes there."""
    memory = f"dom0_mem={shape.dom0_memory_mib}M,max:{shape.dom0_memory_mib}M"
    vcpus = f"dom0_max_vcpus={shape.dom0_vcpus}"
    words = (memory, vcpus, "loglvl=all", "guest_loglvl=all", "conring_size=1M")
    return " ".join((*own, *words, *shape.xen_args))


def _linux_args(shape: Shape, *own: str) -> str:
    words = [*own, "console=hvc0", f"init={_INITS[shape.init]}", "panic=1"]
    if shape.init == "systemd":
        words.append("systemd.unit=multi-user.target")
    else:
        words.append(f"rig.xenstored={shape.xenstored}")
    return " ".join((*words, *shape.linux_args))


def _x86_64(shape: Shape, accel: str) -> list[str]:
    own = ["console=com1", "com1=115200,8n1"]
    if accel == "tcg":
        # Unpinned, dom0's programs now and then die in ld.so once HVM guests run. Without eager
        # FPU switching two HVM guests on one CPU corrupt each other's vector registers.
        own += ["dom0_vcpus_pin", "spec-ctrl=eager-fpu"]
    # With MONITOR/MWAIT exposed Xen panics in mwait_idle_with_hints.
    cpu = "EPYC,-monitor"
    iommu: tuple[str, ...] = ()
    if shape.dom0 == "pvh":
        # Emulated SVM: RDTSCP cannot be intercepted, as Xen does where it has to emulate the TSC.
        own, cpu, iommu = [*own, "dom0=pvh"], f"{cpu},-rdtscp", ("-device", "amd-iommu")
    xen = _xen_args(shape, *own)
    # Protecting and then checking the kernel's own page tables takes seconds under emulation.
    linux = _linux_args(shape, "mitigations=off", *(("rodata=off",) if accel == "tcg" else ()))
    return [
        "qemu-system-x86_64",
        *("-machine", "q35"),
        *("-cpu", cpu if accel == "tcg" else "host"),
        *("-kernel", f"{IMAGE}/xen", "-append", xen),
        *("-initrd", f"{IMAGE}/kernel {_commas(linux)},{IMAGE}/initramfs"),
        *iommu,
        # For a PV dom0 guest-physical is not machine-physical: virtio must go through the DMA API,
        # which is what iommu_platform=on makes it do.
        *("-device", f"virtio-blk-pci,drive=root,{_DMA_API}"),
        *("-device", f"virtio-blk-pci,drive=payload,{_DMA_API}"),
        *("-device", f"virtio-serial-pci,{_DMA_API}"),
    ]


def _arm64(shape: Shape, accel: str) -> list[str]:
    own = ["console=dtuart", "dtuart=/pl011@9000000", "bootscrub=0"]
    if accel == "tcg":
        # credit2, the default, can leave a vCPU runnable beside idle processors until its own one
        # happens to schedule again (xen/common/sched/credit2.c, 4.14 to 4.22). It takes that
        # - the vCPU ran so far past its slice that its credit is near CSCHED2_CREDIT_MIN, where
        #   t2c_update() stops, as it may where a busy host emulates and timers are late;
        # - its processor is busy when it is woken, so that runq_tickle() picks the other one, and
        #   then idle before that one has scheduled: runq_candidate() leaves it to tickled_cpu;
        # - that one refuses it (runq_candidate() again) for not having CSCHED2_MIGRATE_RESIST
        #   (0.5 ms) more credit than what runs there, which is idle: 1 ns below the minimum.
        # Those functions, taken out of Xen 4.20 and called in this order, end so, and the machine
        # did, each of six times that a daemon was killed while two guests rang each other by dom0:
        # QEMU idle, dom0's vCPU with pause_flags=0 and an upcall pending (debug key q), until a
        # character came to Xen's console. With sched_credit2_migrate_resist=0 it went through
        # three times of three. Its credit was not looked at. Never seen with credit, nor on x86,
        # where each vCPU has but one processor.
        own.append("sched=credit")
    xen = _xen_args(shape, *own)
    linux = _linux_args(shape)
    return [
        "qemu-system-aarch64",
        *("-machine", "virt,virtualization=on,gic-version=3", "-cpu", "cortex-a57"),
        *("-kernel", f"{IMAGE}/xen", "-append", xen),
        # guest-loader places a file and says so in the device tree, as Xen's boot protocol wants.
        *_loader(_ARM64_KERNEL_AT, f"kernel={IMAGE}/kernel,bootargs={_commas(linux)}"),
        *_loader(_ARM64_INITRAMFS_AT, f"initrd={IMAGE}/initramfs"),
        # An Arm dom0 is direct-mapped: plain virtio does.
        *("-device", "virtio-blk-device,drive=root"),
        *("-device", "virtio-blk-device,drive=payload"),
        *("-device", "virtio-serial-device"),
    ]


def _loader(address: int, what: str) -> Sequence[str]:
    return ("-device", f"guest-loader,addr={address:#x},{what}")


def _commas(text: str) -> str:
    """QEMU's option parser takes a comma as an end unless it is doubled."""
    return text.replace(",", ",,")
