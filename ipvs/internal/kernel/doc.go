// SPDX-License-Identifier: Apache-2.0

// Package kernel reads and changes what the ipvs mode needs of the kernel besides
// nf_tables: virtual servers of IPVS, the addresses of the dummy device, kernel settings,
// and kube-proxy's ipsets. It knows no Service.
//
// IPVS and the dummy device are changed through a pipe, which sends many netlink requests
// in one system call. docs/design.md has the figures.
package kernel
