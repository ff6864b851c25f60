/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What xshmd.xen._stable has: read by cffi, to which "..." is "ask the compiler"; never included. */

typedef struct xencall_handle xencall_handle;
xencall_handle *xshm_call_open(void);
int xencall_close(xencall_handle *xcall);
void *xencall_alloc_buffer_pages(xencall_handle *xcall, size_t nr_pages);
void xencall_free_buffer_pages(xencall_handle *xcall, void *p, size_t nr_pages);

long xshm_xen_version(xencall_handle *call, int subcall, void *memory);

size_t xshm_batch_bytes(uint32_t capacity);
int xshm_batch_map(xencall_handle *call, void *buffer, uint32_t capacity,
                   uint16_t guest, uint16_t holder, uint64_t guest_gfn, uint64_t holder_gfn,
                   uint32_t nr, uint32_t *nr_done, uint32_t *first_bad, int *first_error);
int xshm_batch_undo(xencall_handle *call, void *buffer, uint32_t capacity,
                    uint16_t guest, uint64_t guest_gfn, uint32_t nr, uint32_t *nr_removed);
int xshm_batch_remove(xencall_handle *call, void *buffer, uint16_t domid,
                      uint64_t first_gfn, uint32_t nr,
                      uint32_t *nr_removed, uint32_t *nr_absent, int *first_error);

typedef struct xenforeignmemory_handle xenforeignmemory_handle;
xenforeignmemory_handle *xshm_foreign_open(void);
int xenforeignmemory_close(xenforeignmemory_handle *fmem);
void *xshm_foreign_map(xenforeignmemory_handle *fmem, uint32_t domid, int writable,
                       uint64_t first_gfn, size_t nr, size_t *nr_bad, int *first_error);
void *xshm_foreign_map_frames(xenforeignmemory_handle *fmem, uint32_t domid, int writable,
                              const uint64_t *gfns, size_t nr, size_t *nr_bad,
                              int *first_error);
typedef struct { uint64_t offset, length; } xshm_piece;
int64_t xshm_scatter_copy(void *target, uint64_t target_size, const xshm_piece *into,
                          uint32_t nr_into, const void *source, uint64_t source_size,
                          const xshm_piece *from, uint32_t nr_from);
void xshm_store_count(void *word, uint64_t count);
int xshm_foreign_probe(xenforeignmemory_handle *fmem, uint32_t domid,
                       const uint64_t *gfns, size_t nr, uint8_t *present);
int xenforeignmemory_unmap(xenforeignmemory_handle *fmem, void *addr, size_t pages);
void *memset(void *s, int c, size_t n);

typedef struct xenforeignmemory_resource_handle xenforeignmemory_resource_handle;
xenforeignmemory_resource_handle *xshm_grant_table(xenforeignmemory_handle *fmem,
                                                   uint16_t domid, uint32_t first_frame,
                                                   uint32_t nr_table_frames, void **table);
int xenforeignmemory_unmap_resource(xenforeignmemory_handle *fmem,
                                    xenforeignmemory_resource_handle *fres);
uint32_t xshm_grants_write(void *table, uint32_t first_ref, uint32_t nr, uint16_t domid,
                           uint32_t first_gfn, int readonly);
uint32_t xshm_grants_end(void *table, uint32_t first_ref, uint32_t nr);
uint32_t xshm_grants_in_use(const void *table, uint32_t first_ref, uint32_t nr);
uint32_t xshm_grants_of_others(const void *table, uint32_t first_ref, uint32_t nr,
                               uint16_t domid);

typedef struct xengntdev_handle xengnttab_handle;
xengnttab_handle *xshm_gnttab_open(void);
int xengnttab_close(xengnttab_handle *xgt);
void *xshm_gnttab_map(xengnttab_handle *xgt, uint32_t domid, uint32_t first_ref, uint32_t nr,
                      int writable);
int xengnttab_unmap(xengnttab_handle *xgt, void *start_address, uint32_t count);
typedef struct {
    uint32_t first_ref, nr_refs;
    const xshm_piece *pieces;
    uint32_t nr;
} xshm_granted;
int64_t xshm_grant_copy(xengnttab_handle *xgt, uint16_t domid, const xshm_granted *into,
                        const xshm_granted *from);
int64_t xshm_decrement(void *word);
