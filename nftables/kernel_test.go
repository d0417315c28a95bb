package nftables

import (
	"runtime"
	"testing"

	"github.com/vishvananda/netns"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// inNamespace moves the test to a network namespace of its own until it ends.
// The thread is not unlocked: it ends with the test's goroutine.
func inNamespace(tb testing.TB) netns.NsHandle {
	tb.Helper()
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		tb.Fatalf("new network namespace (this test needs root): %v", err)
	}
	tb.Cleanup(func() { ns.Close() })
	return ns
}

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
