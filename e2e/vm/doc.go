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
// QEMU emulates the processor, so the tests work where virtual machines cannot
// be nested; SIGNALBOX_VM_ACCEL=kvm is several times faster where they can.
// SIGNALBOX_VM_KERNEL names another kernel package.
//
// The parts of -run below a test of this package choose the tests inside:
//
//	cd e2e && go test ./vm -v -run 'TestContract/TestNFTables/nodeport-basic'
package vm
