// SPDX-License-Identifier: Apache-2.0

// Package access has what all modes with an nf_tables table share: source ranges,
// frontends without endpoints, the keys by which packets find a frontend, hooks,
// validation, number pools, counts of shared elements, and rules that rewrite sources.
// It returns rules and elements to a mode, which calls it; it never calls a mode.
package access
