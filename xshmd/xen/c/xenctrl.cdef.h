/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What xshmd.xen._xenctrl has: read by cffi, to which "..." is "ask the compiler"; never included. */

typedef struct xc_interface_core xc_interface;
typedef uint64_t xen_pfn_t;

xc_interface *xshm_xc_open(void);
int xc_interface_close(xc_interface *xch);

typedef struct { uint8_t handle[16]; uint32_t flags, max_vcpus, max_evtchn_port;
                 int32_t max_grant_frames, max_maptrack_frames; uint32_t grant_opts,
                 vmtrace_size, emulation_flags; } xshm_recipe;
void xshm_holder_recipe(const uint8_t handle[16], xshm_recipe *out);
int xshm_create_holder(xc_interface *xch, const uint8_t handle[16], uint32_t nr_grant_frames,
                       uint32_t *domid);
int xc_domain_max_vcpus(xc_interface *xch, uint32_t domid, unsigned int max);
int xc_domain_setmaxmem(xc_interface *xch, uint32_t domid, uint64_t max_memkb);
int xc_domain_set_target(xc_interface *xch, uint32_t domid, uint32_t target);
int xc_domain_pause(xc_interface *xch, uint32_t domid);
int xc_domain_unpause(xc_interface *xch, uint32_t domid);
int xc_domain_destroy(xc_interface *xch, uint32_t domid);
int xc_domain_shutdown(xc_interface *xch, uint32_t domid, int reason);
int xc_get_paging_mempool_size(xc_interface *xch, uint32_t domid, uint64_t *size);
int xc_set_paging_mempool_size(xc_interface *xch, uint32_t domid, uint64_t size);
int xc_domain_populate_physmap(xc_interface *xch, uint32_t domid, unsigned long nr_extents,
                               unsigned int extent_order, unsigned int mem_flags,
                               xen_pfn_t *extent_start);
int xc_domain_decrease_reservation(xc_interface *xch, uint32_t domid,
                                   unsigned long nr_extents, unsigned int extent_order,
                                   xen_pfn_t *extent_start);
int xc_domain_cacheflush(xc_interface *xch, uint32_t domid, xen_pfn_t start, xen_pfn_t nr);
int xc_evtchn_alloc_unbound(xc_interface *xch, uint32_t domid, uint32_t remote_dom);
int xc_domain_iomem_permission(xc_interface *xch, uint32_t domid, unsigned long first_mfn,
                               unsigned long nr_mfns, uint8_t allow_access);
int xc_domain_memory_mapping(xc_interface *xch, uint32_t domid, unsigned long first_gfn,
                             unsigned long first_mfn, unsigned long nr_mfns,
                             uint32_t add_mapping);

typedef struct { uint64_t address, size; uint32_t kind; } xshm_range;
int xshm_set_memory_map(xc_interface *xch, uint32_t domid, const xshm_range *ranges,
                        uint32_t nr);
int xshm_machine_memory_map(xc_interface *xch, xshm_range *out, uint32_t capacity);
int xshm_entry_register(xc_interface *xch, uint32_t domid, uint64_t *out);

typedef struct { uint32_t domid, flags, max_vcpu_id, nr_online_vcpus, gpaddr_bits;
                 uint64_t tot_pages, max_pages, cpu_time; uint8_t handle[16]; } xshm_info;
int xshm_domain_list(xc_interface *xch, uint32_t first, unsigned int max, xshm_info *out);

typedef struct { uint32_t major, minor, has_hvm, has_hap; uint64_t total_pages, free_pages;
                 char extra[17]; char command_line[1025]; int is_arm; } xshm_host;
int xshm_host_info(xc_interface *xch, xshm_host *out);

#define XEN_DOMINF_dying ...
#define XEN_DOMINF_hvm_guest ...
#define XEN_DOMINF_shutdown ...
#define XEN_DOMINF_paused ...
#define XEN_DOMINF_hap ...
#define XEN_DOMINF_shutdownmask ...
#define XEN_DOMINF_shutdownshift ...
