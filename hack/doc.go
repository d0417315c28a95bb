// SPDX-License-Identifier: Apache-2.0

// Package hack tests the scripts beside it, which the Makefile runs.
package hack
