// SPDX-License-Identifier: Apache-2.0

// Package proxier is the contract between the daemon and the modes. A Mode is a
// way to serve Services, and a Proxier is a mode at work in one IP family.
//
// Both interfaces are all that the daemon, the syncer, metrics and health may ask
// of a mode. A mode embeds ModeDefaults and Defaults, and writes the methods for
// which the default is wrong. Package modes lists the modes.
//
// Package plan has the values that a Proxier is given, service decides them,
// syncer hands them out, and conformance tests a mode. Nothing in this package
// talks to a kernel or to an API server.
package proxier
