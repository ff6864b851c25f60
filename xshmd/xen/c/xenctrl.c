/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * xshmd.xen._xenctrl: domains and the host, by libxenctrl, which is bound to one version of Xen.
 * xenctrl.cdef.h says what of it Python calls. All is static, as cffi puts this text at the top of
 * the module's C (cffi_build.py).
 */

#include <alloca.h>   /* cffi's own code */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <xenctrl.h>
#include <xentoollog.h>
#include <xen/hvm/save.h>

typedef struct { uint64_t address, size; uint32_t kind; } xshm_range;
typedef struct { uint8_t handle[16]; uint32_t flags, max_vcpus, max_evtchn_port;
                 int32_t max_grant_frames, max_maptrack_frames; uint32_t grant_opts,
                 vmtrace_size, emulation_flags; } xshm_recipe;
typedef struct { uint32_t domid, flags, max_vcpu_id, nr_online_vcpus, gpaddr_bits;
                 uint64_t tot_pages, max_pages, cpu_time; uint8_t handle[16]; } xshm_info;
typedef struct { uint32_t major, minor, has_hvm, has_hap; uint64_t total_pages, free_pages;
                 char extra[17]; char command_line[1025]; int is_arm; } xshm_host;

static xc_interface *xshm_xc_open(void)
{
    /* libxenctrl's own complaints would go to stderr without a domain's name or a remedy;
     * every error comes back as an errno, and is reported by us with both. */
    xentoollog_logger *quiet = (xentoollog_logger *)
        xtl_createlogger_stdiostream(stderr, XTL_CRITICAL, 0);
    return xc_interface_open(quiet, quiet, 0);
}

/* The holder: looks like an ordinary HVM guest, has a vCPU 0 that never runs, no event channel
 * but the reserved port 0, the smallest grant table there is, no maptrack. */
static void xshm_fill(const uint8_t handle[16], struct xen_domctl_createdomain *c)
{
    memset(c, 0, sizeof *c);
    memcpy(c->handle, handle, 16);
    c->flags = XEN_DOMCTL_CDF_hvm | XEN_DOMCTL_CDF_hap;
    c->max_vcpus = 1;
    c->max_evtchn_port = 0;
    c->max_grant_frames = 1;
    c->max_maptrack_frames = 0;
    c->grant_opts = XEN_DOMCTL_GRANT_version(1);
#if defined(__x86_64__)
    c->arch.emulation_flags =
        XEN_X86_EMU_ALL & ~(XEN_X86_EMU_VPCI | XEN_X86_EMU_USE_PIRQ);
#elif defined(__aarch64__)
    c->arch.gic_version = XEN_DOMCTL_CONFIG_GIC_NATIVE;
#else
#error "Xen runs this project's guests on x86_64 and arm64 only"
#endif
}

static void xshm_holder_recipe(const uint8_t handle[16], xshm_recipe *out)
{
    struct xen_domctl_createdomain c;
    xshm_fill(handle, &c);
    memset(out, 0, sizeof *out);
    memcpy(out->handle, c.handle, 16);
    out->flags = c.flags;
    out->max_vcpus = c.max_vcpus;
    out->max_evtchn_port = c.max_evtchn_port;
    out->max_grant_frames = c.max_grant_frames;
    out->max_maptrack_frames = c.max_maptrack_frames;
    out->grant_opts = c.grant_opts;
    out->vmtrace_size = c.vmtrace_size;
#if defined(__x86_64__)
    out->emulation_flags = c.arch.emulation_flags;
#endif
}

/* One that serves grants differs in nothing but the most its grant table may grow to. */
static int xshm_create_holder(xc_interface *xch, const uint8_t handle[16],
                              uint32_t nr_grant_frames, uint32_t *domid)
{
    struct xen_domctl_createdomain c;
    xshm_fill(handle, &c);
    c.max_grant_frames = nr_grant_frames;
    *domid = 0x7FF5;   /* DOMID_ANY, by number: the name is younger than Xen 4.18's headers */
    return xc_domain_create(xch, domid, &c);
}

/* x86's E820 maps, and what is in a vCPU's registers: Arm has neither, and says ENOSYS. */
#if defined(__x86_64__)
static int xshm_set_memory_map(xc_interface *xch, uint32_t domid, const xshm_range *ranges,
                               uint32_t nr)
{
    struct e820entry entries[E820MAX];
    uint32_t i;

    if ( nr > E820MAX ) {
        errno = EINVAL;
        return -1;
    }
    for ( i = 0; i < nr; i++ ) {
        entries[i].addr = ranges[i].address;
        entries[i].size = ranges[i].size;
        entries[i].type = ranges[i].kind;
    }
    return xc_domain_set_memory_map(xch, domid, entries, nr);
}

static int xshm_machine_memory_map(xc_interface *xch, xshm_range *out, uint32_t capacity)
{
    struct e820entry entries[E820MAX];
    int n, i;

    n = xc_get_machine_memory_map(xch, entries, capacity < E820MAX ? capacity : E820MAX);
    for ( i = 0; i < n; i++ ) {
        out[i].address = entries[i].addr;
        out[i].size = entries[i].size;
        out[i].kind = entries[i].type;
    }
    return n;
}

static int xshm_entry_register(xc_interface *xch, uint32_t domid, uint64_t *out)
{
    HVM_SAVE_TYPE(CPU) cpu;

    if ( xc_domain_hvm_getcontext_partial(xch, domid, HVM_SAVE_CODE(CPU), 0, &cpu,
                                          sizeof cpu) )
        return -1;
    *out = cpu.rbx;
    return 0;
}
#else
static int xshm_unknown_here(void) { errno = ENOSYS; return -1; }
static int xshm_set_memory_map(xc_interface *xch, uint32_t domid, const xshm_range *ranges,
                               uint32_t nr)
{
    (void)xch; (void)domid; (void)ranges; (void)nr;
    return xshm_unknown_here();
}
static int xshm_machine_memory_map(xc_interface *xch, xshm_range *out, uint32_t capacity)
{
    (void)xch; (void)out; (void)capacity;
    return xshm_unknown_here();
}
static int xshm_entry_register(xc_interface *xch, uint32_t domid, uint64_t *out)
{
    (void)xch; (void)domid; (void)out;
    return xshm_unknown_here();
}
#endif

static int xshm_domain_list(xc_interface *xch, uint32_t first, unsigned int max, xshm_info *out)
{
    xc_domaininfo_t infos[64];
    int n, i;

    n = xc_domain_getinfolist(xch, first, max < 64 ? max : 64, infos);
    for ( i = 0; i < n; i++ ) {
        memset(&out[i], 0, sizeof out[i]);
        out[i].domid = infos[i].domain;
        out[i].flags = infos[i].flags;
        out[i].max_vcpu_id = infos[i].max_vcpu_id;
        out[i].nr_online_vcpus = infos[i].nr_online_vcpus;
        out[i].gpaddr_bits = infos[i].gpaddr_bits;
        out[i].tot_pages = infos[i].tot_pages;
        out[i].max_pages = infos[i].max_pages;
        out[i].cpu_time = infos[i].cpu_time;
        memcpy(out[i].handle, infos[i].handle, 16);
    }
    return n;
}

static int xshm_host_info(xc_interface *xch, xshm_host *out)
{
    xc_physinfo_t phys;
    xen_extraversion_t extra;
    xen_commandline_t command_line;
    int version;

    memset(out, 0, sizeof *out);
    memset(&phys, 0, sizeof phys);
    memset(extra, 0, sizeof extra);
    memset(command_line, 0, sizeof command_line);
    version = xc_version(xch, XENVER_version, NULL);
    if ( version < 0 || xc_version(xch, XENVER_extraversion, &extra) < 0 ||
         xc_version(xch, XENVER_commandline, &command_line) < 0 || xc_physinfo(xch, &phys) )
        return -1;
    out->major = version >> 16;
    out->minor = version & 0xffff;
    memcpy(out->extra, extra, 16);
    memcpy(out->command_line, command_line, 1024);
    out->has_hvm = !!(phys.capabilities & XEN_SYSCTL_PHYSCAP_hvm);
    out->has_hap = !!(phys.capabilities & XEN_SYSCTL_PHYSCAP_hap);
    out->total_pages = phys.total_pages;
    out->free_pages = phys.free_pages;
#if defined(__aarch64__)
    out->is_arm = 1;
#endif
    return 0;
}
