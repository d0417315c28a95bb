// SPDX-License-Identifier: Apache-2.0

package access

import (
	"errors"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"signalbox/internal/nstest"
	"signalbox/nft"
	"signalbox/nft/nfttest"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// TestSupported: this kernel can all, each feature alone can be tried, and
// nothing of the attempt stays.
func TestSupported(t *testing.T) {
	for _, f := range plan.Families {
		t.Run(f.String(), func(t *testing.T) {
			nstest.Enter(t)
			before := nstest.Generation(t)
			if err := Supported("a mode", f, Sets(), []nft.Chain{nft.NewChain("check", FilterForward, Rules{IPFamily: nft.FamilyOf(f)}.CheckSources()...)}); err != nil {
				t.Fatal(err)
			}
			if now := nstest.Generation(t); now != before {
				t.Errorf("the kernel counted %d transactions, so it notified others of rules", now-before)
			}
			w, err := nft.Open(nft.FamilyOf(f), probeTable, probeSets())
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			for _, feature := range features(w.IPFamily) {
				if err := w.Try(func() { feature.write(w) }); err != nil {
					t.Errorf("%s: %v", feature.missing, err)
				}
			}
			lost := func() { w.RewriteChains([]nft.Chain{nft.NewChain("nowhere", nil, nft.NewRule(nft.Drop()))}) }
			if err := w.Try(lost); !errors.Is(err, unix.ENOENT) {
				t.Errorf("a rule of a chain that does not exist: %v", err)
			}
			if left, err := w.Inspect(); left != nil || err != nil {
				t.Errorf("the attempt left behind %v (%v)", left, err)
			}
		})
	}
}

// TestDiagnose: the error names the first feature that the kernel refuses.
func TestDiagnose(t *testing.T) {
	for _, test := range []struct {
		want    string
		refuses func(missing string) error
	}{
		{"numgen", func(missing string) error {
			if missing == "" || strings.Contains(missing, "numgen") || strings.Contains(missing, "dnat") {
				return unix.ENOENT
			}
			return nil
		}},
		{"together", func(missing string) error {
			if missing == "" {
				return unix.EINVAL
			}
			return nil
		}},
		{"CAP_NET_ADMIN", func(string) error { return unix.EPERM }},
	} {
		err := diagnose("a mode", plan.IPv4, func() error { return test.refuses("") }, func(f feature) error { return test.refuses(f.missing) })
		var unsupported *proxier.UnsupportedError
		if !errors.As(err, &unsupported) || unsupported.Mode != "a mode" || !strings.Contains(err.Error(), test.want) || unsupported.Err == nil {
			t.Errorf("error %v, want an UnsupportedError that names %q", err, test.want)
		}
	}
}

// TestDropWithoutNFTables: in a kernel without nf_tables, nfnetlink refuses each message.
// There is no table then, and that is no failure.
func TestDropWithoutNFTables(t *testing.T) {
	k := &nfttest.Kernel{Refuse: func(int, int) syscall.Errno { return unix.EINVAL }}
	table, err := nft.Open(nft.FamilyOf(plan.IPv4), "services", nil, k.Connection())
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	if removed, err := drop(table); removed || err != nil {
		t.Errorf("removed: %t, error: %v; want neither", removed, err)
	}
}
