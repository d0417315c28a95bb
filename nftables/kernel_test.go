// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"testing"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

var testOptions = proxier.Options{MasqueradeMark: proxier.DefaultMasqueradeMark}

func newProxier(tb testing.TB, f plan.Family) *Proxier {
	tb.Helper()
	opts := testOptions
	opts.Family = f
	p, err := New(opts)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { p.Close() })
	return p
}
