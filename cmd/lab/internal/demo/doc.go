// SPDX-License-Identifier: Apache-2.0

// Package demo shows what signalbox does, on one machine and with real packets:
// it builds a lab of network namespaces, runs the real binary on one of its
// nodes in one mode after the other, sends real connections, and prints who
// answered, which source address they saw, and how fast it was. What comes out
// wrong is named and makes the demo fail.
//
// The machine is left as it was: the namespaces have no names and end with the
// process, the daemon is ended by its pid, and all files are in one temporary
// directory. Should the demo itself be killed, the kernel ends the daemon, and
// only that directory stays.
package demo
