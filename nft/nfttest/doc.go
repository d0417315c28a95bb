// SPDX-License-Identifier: Apache-2.0

// Package nfttest plays nf_tables in memory, for tests that need a kernel which fails, or
// no network namespace. No program links it.
//
// A Kernel holds tables, chains, rules, sets, elements and counters. It speaks netlink, so
// nft.Open and the library below it work as with Linux:
//
//	var kernel nfttest.Kernel
//	table, err := nft.Open(family, "example", sets, kernel.Connection())
//
// A transaction takes effect whole or not at all, and is refused with Linux's error numbers.
// A test runs the same operations on both kernels and compares. No packet ever passes: of a
// rule only the references to chains, sets and counters are checked. Elements do not expire.
package nfttest
