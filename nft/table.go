// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"signalbox/nft/notify"
)

// Table is a connection to the kernel for one table. It gathers changes until Commit
// sends them as one transaction.
type Table struct {
	*IPFamily
	conn  *nftables.Conn
	table *nftables.Table
	// sets and declared are indexed by SetID.
	sets     []*Set
	declared []*nftables.Set
	options  []nftables.ConnOption
	batch    []nftables.SetElement // reused from one batch to the next
	failed   error                 // the first error of gathering
	gathered int                   // elements since the last Commit
	// changes is nil without Subscribe.
	changes atomic.Pointer[notify.Subscription]
}

// BatchElements is how many elements the library gets at once. They fit into one of its
// messages, which have at most 64 KiB.
const BatchElements = 512

var (
	// ErrUnknownState says that the kernel's answer to a transaction is missing.
	ErrUnknownState = errors.New("the outcome of the transaction is not known")
	// ErrTableChanged says that the kernel's table is not as this process left it.
	ErrTableChanged = errors.New("others changed the table")
)

// Open connects to nf_tables for a table with these sets. It writes nothing. A test passes
// the option that connects to an nfttest.Kernel.
func Open(f *IPFamily, table string, sets []*Set, options ...nftables.ConnOption) (*Table, error) {
	conn, err := dial(options...)
	if err != nil {
		return nil, fmt.Errorf("open netlink to nf_tables: %w", err)
	}
	t := &Table{IPFamily: f, conn: conn, options: options, sets: sets, table: &nftables.Table{Name: table, Family: f.Table}}
	for _, s := range sets {
		t.declared = append(t.declared, s.declaration(f, t.table))
	}
	return t, nil
}

// Subscribe has NextChange report what other software does to the table. Any goroutine may
// call it, before NextChange. An nfttest.Kernel notifies of nothing.
func (t *Table) Subscribe() error {
	if t.conn.TestDial != nil {
		return nil
	}
	port, err := t.conn.GetPortID()
	if err != nil {
		return fmt.Errorf("subscribe to changes of table %s: %w", t.table.Name, err)
	}
	changes, err := notify.Subscribe(byte(t.IPFamily.Table), port, t.table.Name)
	t.changes.Store(changes)
	return err
}

// NextChange waits until other software has changed the table. It returns false when ctx
// ends, or at once without Subscribe. Any goroutine may call it, one at a time.
func (t *Table) NextChange(ctx context.Context) (notify.Change, bool) {
	changes := t.changes.Load()
	if changes == nil {
		return notify.Change{}, false
	}
	return changes.Next(ctx)
}

// Close closes the connection. The table stays.
func (t *Table) Close() error {
	if changes := t.changes.Load(); changes != nil {
		changes.Close()
	}
	defer refill()
	return t.conn.CloseLasting()
}

// Commit sends the gathered changes as one transaction. After that nothing is gathered,
// also after an error. The error wraps ErrUnknownState or ErrTableChanged, unless the
// kernel is sure to have what it had before and that is what was expected.
func (t *Table) Commit() error {
	failed := t.failed
	t.failed = nil
	// After a failure the library holds its own error too and sends nothing,
	// but forgets what has gathered.
	err := t.flush()
	switch {
	case failed != nil:
		return failed
	case err == nil:
		return nil
	case isForeignChange(err):
		return fmt.Errorf("%w: %w", ErrTableChanged, err)
	case !isRefusal(err):
		return fmt.Errorf("%w: %w", ErrUnknownState, err)
	}
	return err
}

// mutedElements is how many elements a transaction has of which the kernel must not
// notify: see notify.Subscription.Mute.
const mutedElements = 1000

func (t *Table) flush() error {
	n, changes := t.gathered, t.changes.Load()
	t.gathered = 0
	if changes == nil || n < mutedElements {
		return t.conn.Flush()
	}
	return changes.Mute(func() (transactions int, err error) {
		if err = t.conn.Flush(); err == nil {
			transactions = 1
		}
		return transactions, err
	})
}

// isRefusal says whether the transaction was not sent, or the kernel answered with an
// error number and undid it. Otherwise the answer could not be read.
func isRefusal(err error) bool {
	var op *netlink.OpError
	if !errors.As(err, &op) {
		return false
	}
	var call *os.SyscallError
	return op.Op != "receive" || !errors.As(err, &call)
}

// isForeignChange recognises answers that mean that other software changed the table:
// what the transaction removes is not there, or what it adds is there already. A smaller
// transaction would fail too. A full write helps.
func isForeignChange(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY)
}

// deleteTable deletes the table if it exists. Kernels before 6.3 cannot be asked to
// delete a table that may not exist. To add a table that exists is no error.
func (t *Table) deleteTable() {
	t.conn.AddTable(t.table)
	t.conn.DelTable(t.table)
}

// ReplaceTable deletes the table if it exists, and adds it with its sets.
func (t *Table) ReplaceTable() {
	t.deleteTable()
	t.conn.AddTable(t.table)
	t.AddSets()
}

// DeleteTable deletes the table and says whether it exists. If not, there is nothing to
// commit.
func (t *Table) DeleteTable() (exists bool) {
	exists, err := t.Exists()
	switch {
	case err != nil && t.failed == nil:
		t.failed = err
	case exists:
		t.deleteTable()
	}
	return exists
}

// Try has the kernel check what write gathers, in a table that does not exist, and undo
// it: the transaction ends with a request that must fail. So nothing is written, and
// software that watches the rules is not notified.
func (t *Table) Try(write func()) error {
	t.conn.AddTable(t.table)
	write()
	t.conn.CreateTable(t.table)
	err := t.Commit()
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	if err == nil {
		err = errors.New("the kernel made two tables of one name")
	}
	return err
}

// Exists says whether the kernel has the table.
func (t *Table) Exists() (bool, error) {
	found, err := t.find()
	return found != nil, err
}

// find returns the kernel's table; nil if there is none.
func (t *Table) find() (*nftables.Table, error) {
	tables, err := t.conn.ListTablesOfFamily(t.IPFamily.Table)
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	for _, found := range tables {
		if found.Name == t.table.Name {
			return found, nil
		}
	}
	return nil, nil
}

// AddSets adds all sets except those that are present.
func (t *Table) AddSets(present ...SetID) {
	for i := range t.declared {
		if !slices.Contains(present, SetID(i)) {
			t.AddSet(SetID(i))
		}
	}
}

// AddSet adds one set.
func (t *Table) AddSet(id SetID) {
	set := t.declared[id]
	set.ID = 0 // numbers count within one transaction
	t.check(t.conn.AddSet(set, nil), set)
}

// check keeps the first error for Commit.
func (t *Table) check(err error, set *nftables.Set) {
	if err != nil && t.failed == nil {
		t.failed = fmt.Errorf("set %s: %w", set.Name, err)
	}
}

// AddChain adds a chain without its rules. An existing chain stays.
func (t *Table) AddChain(c Chain) { t.conn.AddChain(t.chain(c)) }

// chain is the library's form of a chain.
func (t *Table) chain(c Chain) *nftables.Chain {
	out := &nftables.Chain{Name: c.Name, Table: t.table}
	if c.Hook != nil {
		policy := nftables.ChainPolicyAccept
		out.Type, out.Hooknum, out.Priority, out.Policy = c.Hook.kind, c.Hook.num, &c.Hook.priority, &policy
	}
	return out
}

func (t *Table) addRules(c Chain) {
	for _, r := range c.Rules {
		data, err := r.userData(t.table.Family)
		if err != nil && t.failed == nil {
			t.failed = err
		}
		t.conn.AddRule(&nftables.Rule{Table: t.table, Chain: &nftables.Chain{Name: c.Name, Table: t.table}, Exprs: r.exprs(), UserData: data})
	}
}

// AddChains adds chains and then their rules, which may jump to any of them.
func (t *Table) AddChains(chains []Chain) {
	for _, c := range chains {
		t.AddChain(c)
	}
	for _, c := range chains {
		t.addRules(c)
	}
}

// RewriteChains replaces the rules of chains that exist.
func (t *Table) RewriteChains(chains []Chain) {
	for _, c := range chains {
		t.conn.FlushChain(&nftables.Chain{Name: c.Name, Table: t.table})
		t.addRules(c)
	}
}

// DeleteChain deletes a chain with its rules.
func (t *Table) DeleteChain(name string) {
	out := &nftables.Chain{Name: name, Table: t.table}
	t.conn.FlushChain(out)
	t.conn.DelChain(out)
}

// FlushSet deletes the elements of a set.
func (t *Table) FlushSet(id SetID) { t.conn.FlushSet(t.declared[id]) }

// put hands elements to the library in batches of one set.
func (t *Table) put(list []Element, op func(*nftables.Set, []nftables.SetElement) error) {
	for len(list) > 0 {
		set, n := list[0].Set, 1
		for n < len(list) && n < BatchElements && list[n].Set == set {
			n++
		}
		t.batch = t.batch[:0]
		for i := range list[:n] {
			t.batch = t.sets[set].LibraryElements(&list[i], t.batch)
		}
		t.check(op(t.declared[set], t.batch), t.declared[set])
		t.gathered += n
		list = list[n:]
	}
}

// AddElements adds elements. Elements of one set should be adjacent.
func (t *Table) AddElements(list []Element) { t.put(list, t.conn.SetAddElements) }

// RemoveElements removes elements. Elements of one set should be adjacent.
func (t *Table) RemoveElements(list []Element) { t.put(list, t.conn.SetDeleteElements) }

// AddCounter adds a named counter. An existing counter keeps its value.
func (t *Table) AddCounter(name string) { t.conn.AddObj(t.counter(name)) }

// DeleteCounter deletes a named counter, to which no rule may refer.
func (t *Table) DeleteCounter(name string) { t.conn.DeleteObject(t.counter(name)) }

func (t *Table) counter(name string) *nftables.NamedObj {
	return &nftables.NamedObj{Table: t.table, Name: name, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}}
}

// AddRead adds elements in the form in which the library reads them.
func (t *Table) AddRead(id SetID, list []nftables.SetElement) {
	t.inBatches(id, list, t.conn.SetAddElements)
}

// RemoveRead removes elements in that form.
func (t *Table) RemoveRead(id SetID, list []nftables.SetElement) {
	t.inBatches(id, list, t.conn.SetDeleteElements)
}

func (t *Table) inBatches(id SetID, list []nftables.SetElement, op func(*nftables.Set, []nftables.SetElement) error) {
	for batch := range slices.Chunk(list, BatchElements) {
		t.check(op(t.declared[id], batch), t.declared[id])
		t.gathered += len(batch)
	}
}
