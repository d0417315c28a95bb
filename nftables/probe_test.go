package nftables

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"signalbox/nft"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// TestSupported: this kernel can all, each feature alone can be tried, and
// nothing of the attempt stays.
func TestSupported(t *testing.T) {
	for _, f := range plan.Families {
		t.Run(f.String(), func(t *testing.T) {
			inNamespace(t)
			before := generation(t)
			if err := Supported(f); err != nil {
				t.Fatal(err)
			}
			if now := generation(t); now != before {
				t.Errorf("the kernel counted %d transactions, so somebody was told of rules", now-before)
			}
			w, err := dial(nft.FamilyOf(f), probeTable)
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			for _, feature := range features(w.IPFamily) {
				if err := tryFeatures(w, feature); err != nil {
					t.Errorf("%s: %v", feature.missing, err)
				}
			}
			lost := feature{"a chain", "none", func(w *nft.Table) {
				w.RewriteChains([]nft.Chain{nft.NewChain("nowhere", nil, nft.NewRule(nft.Drop()))})
			}}
			if err := tryFeatures(w, lost); !errors.Is(err, unix.ENOENT) {
				t.Errorf("a rule of a chain that does not exist: %v", err)
			}
			if listing := runNft(t, "list", "ruleset"); listing != "" {
				t.Errorf("the attempt left behind:\n%s", listing)
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
		err := diagnose(plan.IPv4, func(features ...feature) error { return test.refuses(features[0].missing) })
		var unsupported *proxier.UnsupportedError
		if !errors.As(err, &unsupported) || unsupported.Mode != Mode || !strings.Contains(err.Error(), test.want) || unsupported.Err == nil {
			t.Errorf("error %v, want an UnsupportedError that names %q", err, test.want)
		}
	}
}
