// SPDX-License-Identifier: Apache-2.0

// Package features holds tests of the kernel that they run on, and of the
// programs beside it. They are meant for a virtual machine of package vm, which
// has no other kernel features than those it was given; the build tag guest
// keeps them from running elsewhere.
package features
