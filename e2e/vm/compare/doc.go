// SPDX-License-Identifier: Apache-2.0

// Package compare runs `lab compare` in a virtual machine of package vm: most machines'
// kernels have no IPVS and no SCTP. The build tag guest keeps its test from running
// elsewhere.
package compare
