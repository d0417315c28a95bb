// SPDX-License-Identifier: Apache-2.0

// Package vm runs compiled Go tests in a virtual machine with Debian's kernel,
// and makes their results the results of an ordinary test.
//
// The contract suite needs kernel features that not every machine has (IPVS,
// dummy devices, SCTP), and is to hold on an older kernel than a developer's.
// A machine consists of a kernel package, downloaded and unpacked but never
// installed, and of an initramfs made for one run: the process 1 of package
// guest, the test binary, the kernel modules in the order of their
// dependencies, and the programs that the tests call. It has no disk and no
// network; the results come over its second serial line.
//
// # What runs
//
// `make vm` runs what only a machine can prove: the IPVS mode and its contract,
// SCTP in every mode, the real kube-proxy in ipvs mode, and for the modes that
// speak nf_tables one scenario of each kind on an older kernel. `make soak` runs
// every mode against the whole contract. Machines run beside each other, as many
// as the host has processors.
//
// The parts of -run below a test of this package choose the tests inside:
//
//	cd e2e && go test ./vm -v -run 'TestContract/TestNFTables/nodeport-basic'
//
// With -v, the lines of the tests inside appear as they come.
//
// # One processor each
//
// A machine has one virtual processor. The kernel switches a netfilter hook on
// or off by rewriting its own code: it puts a breakpoint (int3) where a packet
// runs, then the new instruction. QEMU 7.2 emulates each processor in a thread
// of its own (multi-threaded TCG). While one thread writes an instruction,
// another can translate the old one and keep that translation. A processor then
// meets a breakpoint that is gone, and the kernel sends it back to the same
// place, forever. With one processor, nobody translates while it writes.
// TestHooksComeAndGo of package features switches hooks while packets pass.
//
// # When a machine fails
//
// The runner reads the kernel's console. A report of a stall, a lockup, a hung
// task, a BUG, an oops or a panic ends the machine after the few seconds that
// the kernel needs to write the stack. The failure holds the report and the
// names of the tests that were running.
//
// # Settings
//
// QEMU emulates the processor, so the tests work where virtual machines cannot
// be nested; SIGNALBOX_VM_ACCEL=kvm is several times faster where they can.
// SIGNALBOX_VM_KERNEL names another kernel package.
package vm
