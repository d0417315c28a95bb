// SPDX-License-Identifier: Apache-2.0

//go:build race

package daemon_test

// With the race detector in the tests, the program has it, too. A race ends it with
// status 66.
func init() { buildFlags = []string{"-race"} }
