// SPDX-License-Identifier: Apache-2.0

// Package nstest lets a test write to the kernel: in a network namespace of its own,
// away from the machine's rules and addresses.
package nstest

import (
	"bytes"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netns"
)

// Enter moves the test to a new network namespace until it ends. The thread stays
// locked, so it ends with the test's goroutine.
func Enter(t testing.TB) netns.NsHandle {
	t.Helper()
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		t.Fatalf("new network namespace (this test needs root): %v", err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// NFT runs nft in the namespace of the calling thread and returns its output, without the
// warnings of nft.
func NFT(t testing.TB, input string, args ...string) string {
	t.Helper()
	cmd := exec.Command("nft", args...)
	cmd.Stdin = strings.NewReader(input)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s%s\n%s", cmd, err, out, stderr.Bytes(), input)
	}
	return string(out)
}

// Generation is the count of nf_tables transactions in the namespace. Options can
// name another kernel, as nfttest plays one.
func Generation(t testing.TB, options ...nftables.ConnOption) uint32 {
	t.Helper()
	conn, err := nftables.New(options...)
	if err != nil {
		t.Fatal(err)
	}
	gen, err := conn.GetGen()
	if err != nil {
		t.Fatal(err)
	}
	return gen.ID
}
