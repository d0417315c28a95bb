// SPDX-License-Identifier: Apache-2.0

//go:build guest

package features

import (
	"net"
	"testing"
	"time"

	"github.com/google/nftables"
)

// TestHooksComeAndGo registers the first netfilter hook of a kind and removes
// it again, many times, while packets pass it. The kernel rewrites its own code
// each time: it puts a breakpoint where a packet runs. A QEMU whose processors
// run in threads of their own can go on executing a breakpoint that is gone.
func TestHooksComeAndGo(t *testing.T) {
	const rounds = 100
	stop := make(chan struct{})
	passed := make(chan int)
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		conn, err := net.ListenPacket("udp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		go func() { passed <- talkToSelf(t, conn, stop) }()
	}
	began := time.Now()
	for range rounds {
		if err := hooksComeAndGo(); err != nil {
			t.Error(err)
			break
		}
	}
	took := time.Since(began)
	close(stop)
	t.Logf("%d rounds in %v; %d and %d packets", rounds, took, <-passed, <-passed)
}

// talkToSelf sends datagrams to the socket that they come from, and counts
// them.
func talkToSelf(t *testing.T, conn net.PacketConn, stop chan struct{}) (n int) {
	buffer := make([]byte, 16)
	for {
		select {
		case <-stop:
			return n
		default:
		}
		if _, err := conn.WriteTo([]byte("hello"), conn.LocalAddr()); err != nil {
			t.Error(err)
			return n
		}
		if _, _, err := conn.ReadFrom(buffer); err != nil {
			t.Error(err)
			return n
		}
		n++
	}
}

// hooksComeAndGo makes a table with a chain at every hook of both families,
// and deletes it.
func hooksComeAndGo() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "hooks"})
	for name, hook := range map[string]*nftables.ChainHook{
		"prerouting": nftables.ChainHookPrerouting, "input": nftables.ChainHookInput, "forward": nftables.ChainHookForward,
		"output": nftables.ChainHookOutput, "postrouting": nftables.ChainHookPostrouting,
	} {
		c.AddChain(&nftables.Chain{Name: name, Table: table, Hooknum: hook, Priority: nftables.ChainPriorityFilter, Type: nftables.ChainTypeFilter})
	}
	if err := c.Flush(); err != nil {
		return err
	}
	c.DelTable(table)
	return c.Flush()
}
