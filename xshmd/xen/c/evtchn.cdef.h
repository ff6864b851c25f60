/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What xshmd.xen._evtchn has: read by cffi, to which "..." is "ask the compiler"; never included. */

typedef struct xshm_relay xshm_relay;
xshm_relay *xshm_relay_open(uint32_t capacity, int *error);
void xshm_relay_close(xshm_relay *relay);
int xshm_relay_fd(xshm_relay *relay);
int xshm_relay_run(xshm_relay *relay);
void xshm_relay_stop(xshm_relay *relay);
int xshm_relay_bind(xshm_relay *relay, uint32_t domid, uint32_t port);
int xshm_relay_unbind(xshm_relay *relay, uint32_t local);
int xshm_relay_notify(xshm_relay *relay, uint32_t local);
int xshm_relay_unmask(xshm_relay *relay, uint32_t local);
int xshm_relay_to(xshm_relay *relay, uint32_t from, uint32_t to);
uint64_t xshm_relay_rings(xshm_relay *relay, uint32_t local);
uint64_t xshm_relay_held(xshm_relay *relay);
int xshm_evtchn_allocate(xshm_relay *relay, uint16_t domid, uint16_t remote);
int xshm_evtchn_status(xshm_relay *relay, uint16_t domid, uint32_t port,
                       uint32_t *remote, uint32_t *remote_port);
#define EVTCHNSTAT_unbound ...
#define EVTCHNSTAT_interdomain ...
