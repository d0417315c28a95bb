// SPDX-License-Identifier: Apache-2.0

package notify

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/nftables"

	"signalbox/internal/nstest"
)

// world is a network namespace with a table, and a connection of this process.
type world struct {
	*testing.T
	own *nftables.Conn
	*Subscription
	table *nftables.Table
	set   *nftables.Set
}

func newWorld(t *testing.T) *world {
	t.Helper()
	nstest.Enter(t)
	own, err := nftables.New(nftables.AsLasting())
	if err != nil {
		t.Fatal(err)
	}
	port, err := own.GetPortID()
	if err != nil {
		t.Fatal(err)
	}
	table := &nftables.Table{Name: "services", Family: nftables.TableFamilyIPv4}
	w := &world{t, own, nil, table, &nftables.Set{Table: table, Name: "numbers", KeyType: nftables.TypeMark}}
	if w.Subscription, err = Subscribe(byte(table.Family), port, table.Name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.Close()
		own.CloseLasting()
	})
	own.AddTable(table)
	own.AddChain(&nftables.Chain{Table: table, Name: "a"})
	w.must(own.AddSet(w.set, nil))
	w.must(own.Flush())
	w.foreign("add rule ip services a accept\nadd element ip services numbers { 1, 2 }")
	w.next()
	return w
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// foreign has nft run commands in one transaction.
func (w *world) foreign(commands string) {
	w.Helper()
	nstest.NFT(w.T, commands, "-f", "-")
}

// next returns the next change without the number of its process.
func (w *world) next() Change {
	w.Helper()
	c, ok := w.Next(w.Context())
	if !ok {
		w.Fatal("the test has ended")
	}
	if !c.Lost && c.PID == 0 {
		w.Error("the process has no number")
	}
	c.PID = 0
	return c
}

func (w *world) wantNext(what string, want Change) {
	w.Helper()
	if diff := cmp.Diff(want, w.next()); diff != "" {
		w.Errorf("%s (-want +got)\n%s", what, diff)
	}
}

// addOwn has this process add elements with these numbers, in messages of 500.
func (w *world) addOwn(from, to uint32) {
	w.Helper()
	for ; from < to; from += 500 {
		var list []nftables.SetElement
		for n := range uint32(500) {
			list = append(list, nftables.SetElement{Key: binary.NativeEndian.AppendUint32(nil, from+n)})
		}
		w.must(w.own.SetAddElements(w.set, list))
	}
}

func (w *world) flush() (transactions int, err error) { return 1, w.own.Flush() }

var (
	elements = Change{Process: "nft"}
	rules    = Change{Process: "nft", Rules: true}
)

func TestForeignChanges(t *testing.T) {
	for _, test := range []struct {
		commands string
		want     Change
	}{
		{"add element ip services numbers { 3 }", elements},
		{"delete element ip services numbers { 1 }", elements},
		{"flush set ip services numbers", elements},
		{"flush chain ip services a", rules},
		{"insert rule ip services a drop", rules},
		{"add chain ip services b", rules},
		{"delete set ip services numbers", rules},
		{"delete table ip services", rules},
		{"add table ip services { flags dormant; }", rules},
		{"flush ruleset", rules},
	} {
		t.Run(test.commands, func(t *testing.T) {
			w := newWorld(t)
			w.foreign(test.commands)
			w.wantNext("the change", test.want)
		})
	}
}

// TestOtherTables: changes of other tables and of other families are not reported. They
// would be changes of rules.
func TestOtherTables(t *testing.T) {
	w := newWorld(t)
	w.foreign("add table ip other\nadd chain ip other a\nadd table ip6 services\nadd chain ip6 services a")
	w.foreign("add element ip services numbers { 3 }")
	w.wantNext("after changes of other tables", elements)
	w.foreign("delete table ip other\nadd element ip services numbers { 4 }")
	w.wantNext("after one transaction for two tables", elements)
}

// TestOwnTransactions: this process's own changes are not reported, whichever connection
// makes them.
func TestOwnTransactions(t *testing.T) {
	w := newWorld(t)
	other, err := nftables.New(nftables.AsLasting())
	w.must(err)
	defer other.CloseLasting()
	port, err := other.GetPortID()
	w.must(err)
	second, err := Subscribe(byte(nftables.TableFamilyIPv6), port, "services")
	w.must(err)
	w.own.AddChain(&nftables.Chain{Table: w.table, Name: "b"})
	w.must(w.own.Flush())
	other.AddChain(&nftables.Chain{Table: w.table, Name: "c"})
	w.must(other.Flush())
	w.foreign("add element ip services numbers { 3 }")
	w.wantNext("after own changes of rules", elements)

	second.Close()
	w.foreign("add chain ip services d")
	w.wantNext("when another subscription has ended", rules)
}

// TestMute: a muted transaction is not reported. What other software does meanwhile is.
func TestMute(t *testing.T) {
	w := newWorld(t)
	w.addOwn(1000, 3000)
	w.must(w.Mute(w.flush))
	w.foreign("add element ip services numbers { 3 }")
	w.wantNext("after a muted transaction", elements)

	w.addOwn(3000, 5000)
	w.must(w.Mute(func() (int, error) {
		w.foreign("add chain ip services b")
		return w.flush()
	}))
	w.wantNext("after a foreign transaction meanwhile", Change{Lost: true})
}

// TestMuteDuringForeignCommit: the kernel counts a transaction before it notifies of it. A
// muted transaction that begins in between does not hide it.
func TestMuteDuringForeignCommit(t *testing.T) {
	var many strings.Builder
	for n := range 50_000 {
		fmt.Fprintf(&many, "%d, ", 10_000+n)
	}
	for range 2 { // not each run meets the moment
		w := newWorld(t)
		w.addOwn(1000, 3000)
		before, err := w.listener.generation()
		w.must(err)
		foreign := exec.Command("nft", "-f", "-")
		foreign.Stdin = strings.NewReader("add element ip services numbers { " + many.String() + "}")
		w.must(foreign.Start())
		for now := before; now == before; {
			now, err = w.listener.generation()
			w.must(err)
		}
		w.must(w.Mute(w.flush))
		w.must(foreign.Wait())
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if _, ok := w.Next(ctx); !ok {
			t.Error("the foreign transaction is not noticed")
		}
		cancel()
	}
}

// TestMuteOfFailure: a muted transaction that fails counts as none.
func TestMuteOfFailure(t *testing.T) {
	w := newWorld(t)
	refused := errors.New("refused")
	if err := w.Mute(func() (int, error) { return 0, refused }); err != refused {
		t.Errorf("error %v", err)
	}
	w.foreign("add element ip services numbers { 3 }")
	w.wantNext("after the failure", elements)
}

// TestOverflow: notifications that the socket has no room for count as a change.
func TestOverflow(t *testing.T) {
	w := newWorld(t)
	var many strings.Builder
	for n := range 30_000 {
		fmt.Fprintf(&many, "%d, ", 10_000+n)
	}
	w.listener.mu.Lock() // the reader waits
	w.foreign("add element ip services numbers { " + many.String() + "}")
	w.listener.mu.Unlock()
	if c := w.next(); !c.Lost {
		t.Errorf("%+v, want lost notifications", c)
	}
	// The rest of what had room may come later.
	w.foreign("add chain ip services b")
	for c := w.next(); !c.Rules; c = w.next() {
		t.Logf("before the new chain: %+v", c)
	}
}

// TestNextEndsWithContext: a change that comes when nobody waits is for the next caller.
func TestNextEndsWithContext(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w.foreign("add element ip services numbers { 3 }")
	if c, ok := w.Next(ctx); ok {
		t.Errorf("a change after the end: %+v", c)
	}
	w.wantNext("the change", elements)
}

// TestSharedSocket: subscriptions of a namespace share a socket, which closes with the
// last one.
func TestSharedSocket(t *testing.T) {
	w := newWorld(t)
	second, err := Subscribe(byte(nftables.TableFamilyIPv6), 1, "services")
	w.must(err)
	if second.listener != w.listener {
		t.Error("the second subscription has its own socket")
	}
	w.Close()
	second.Close()
	third, err := Subscribe(byte(w.table.Family), 1, w.table.Name)
	w.must(err)
	defer third.Close()
	if third.listener == second.listener {
		t.Error("the socket stays open")
	}
	w.foreign("add element ip services numbers { 3 }")
	got, _ := third.Next(t.Context())
	if diff := cmp.Diff(elements, got, cmpopts.IgnoreFields(Change{}, "PID")); diff != "" {
		t.Errorf("a later subscription (-want +got)\n%s", diff)
	}
}
