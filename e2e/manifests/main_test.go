package manifests

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"signalbox/e2e/cluster"
)

// shared is the control plane that every test applies to; each leaves it as it
// found it.
var shared *cluster.Cluster

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	ctx := context.Background()
	bin, err := cluster.Build(ctx, func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) })
	if err != nil {
		return 0, err
	}
	dir, err := cluster.MakeDir()
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	shared, err = cluster.Start(ctx, bin, cluster.Options{
		Dir:          dir,
		ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:10:96::/112")},
		Advertise:    netip.MustParseAddr("192.0.2.1"),
	})
	if err != nil {
		return 0, err
	}
	code = m.Run()
	return code, shared.Stop()
}
