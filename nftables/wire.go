package nftables

import (
	"errors"
	"fmt"
	"os"
	"slices"

	nflib "github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"signalbox/proxier"
)

// wire is the connection to the kernel. Messages gather in it until flush sends
// them as one transaction.
type wire struct {
	*family
	conn  *nflib.Conn
	table *nflib.Table
	// schemas and sets are indexed by setID.
	schemas []*schema
	sets    []*nflib.Set

	// wireElements is reused from one batch to the next.
	wireElements []nflib.SetElement
	added        int // elements since somebody set it to 0
	// failed is the first error of gathering.
	failed error
}

// batchElements is how many elements go to the library at once. It makes
// messages of at most 64 KiB of them; a batch of its size fits into one.
const batchElements = 512

// dialTable connects to nf_tables for a table with these sets.
func dialTable(f *family, table string, schemas []*schema) (*wire, error) {
	conn, err := dialLow()
	if err != nil {
		return nil, fmt.Errorf("open netlink to nf_tables: %w", err)
	}
	w := &wire{family: f, conn: conn, schemas: schemas, table: &nflib.Table{Name: table, Family: f.table}}
	for _, s := range schemas {
		w.sets = append(w.sets, s.declaration(f, w.table))
	}
	return w, nil
}

func (w *wire) close() error {
	defer refill()
	return w.conn.CloseLasting()
}

// flush sends what has gathered, as one transaction. Whether it succeeds or
// not, nothing stays behind. The error wraps proxier.ErrUnknownState unless the
// kernel is sure to hold what it held before and that is what was expected.
func (w *wire) flush() error {
	failed := w.failed
	w.failed = nil
	// After a failure the library holds its own error too and sends nothing,
	// but forgets what has gathered.
	err := w.conn.Flush()
	switch {
	case failed != nil:
		return failed
	case err == nil:
		return nil
	case isForeignChange(err):
		return fmt.Errorf("%w, or others changed the table: %w", proxier.ErrUnknownState, err)
	case !isRefusal(err):
		return fmt.Errorf("%w: %w", proxier.ErrUnknownState, err)
	}
	return err
}

// isRefusal says whether the transaction was not sent, or was answered with an
// error number and so undone by the kernel. What is left is that the answer
// could not be read.
func isRefusal(err error) bool {
	var op *netlink.OpError
	if !errors.As(err, &op) {
		return false
	}
	var call *os.SyscallError
	return op.Op != "receive" || !errors.As(err, &call)
}

// isForeignChange recognises answers that can only mean that the table is not
// as it was left: what is to go is not there, or what is to come is there
// already. To send less of the same would not help; to write all anew does.
func isForeignChange(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY)
}

// replaceTable deletes the table if it exists and makes it anew.
func (w *wire) replaceTable() {
	w.deleteTable()
	w.conn.AddTable(w.table)
}

// deleteTable deletes the table if it exists: to add one that exists is no
// error, and kernels before 6.3 cannot be asked to delete one that may not.
func (w *wire) deleteTable() {
	w.conn.AddTable(w.table)
	w.conn.DelTable(w.table)
}

// exists says whether the kernel has the table.
func (w *wire) exists() (bool, error) {
	tables, err := w.conn.ListTablesOfFamily(w.family.table)
	if err != nil {
		return false, fmt.Errorf("list tables: %w", err)
	}
	return slices.ContainsFunc(tables, func(t *nflib.Table) bool { return t.Name == w.table.Name }), nil
}

// addSets adds all sets but those that are there already.
func (w *wire) addSets(present ...setID) {
	for i, set := range w.sets {
		if slices.Contains(present, setID(i)) {
			continue
		}
		set.ID = 0 // numbers count within one transaction
		w.check(w.conn.AddSet(set, nil), set)
	}
}

// check keeps the first error for flush.
func (w *wire) check(err error, set *nflib.Set) {
	if err != nil && w.failed == nil {
		w.failed = fmt.Errorf("set %s: %w", set.Name, err)
	}
}

func (w *wire) addChain(c chain) {
	out := &nflib.Chain{Name: c.name, Table: w.table}
	if c.hook != nil {
		policy := nflib.ChainPolicyAccept
		out.Type, out.Hooknum, out.Priority, out.Policy = c.hook.kind, c.hook.num, &c.hook.priority, &policy
	}
	w.conn.AddChain(out)
}

func (w *wire) addRules(c chain) {
	for _, r := range c.rules {
		out := &nflib.Rule{Table: w.table, Chain: &nflib.Chain{Name: c.name, Table: w.table}, Exprs: r.exprs()}
		if r.comment != "" {
			out.UserData = userdata.AppendString(nil, userdata.TypeComment, r.comment)
		}
		w.conn.AddRule(out)
	}
}

// addChains adds chains and then their rules, which may jump to any of them.
func (w *wire) addChains(chains []chain) {
	for _, c := range chains {
		w.addChain(c)
	}
	for _, c := range chains {
		w.addRules(c)
	}
}

// rewriteChains replaces the rules of chains that exist.
func (w *wire) rewriteChains(chains []chain) {
	for _, c := range chains {
		w.conn.FlushChain(&nflib.Chain{Name: c.name, Table: w.table})
		w.addRules(c)
	}
}

func (w *wire) deleteChain(name string) {
	out := &nflib.Chain{Name: name, Table: w.table}
	w.conn.FlushChain(out)
	w.conn.DelChain(out)
}

func (w *wire) flushSet(id setID) { w.conn.FlushSet(w.sets[id]) }

// put hands elements to the library, many of one set at a time.
func (w *wire) put(list []element, op func(*nflib.Set, []nflib.SetElement) error) {
	for len(list) > 0 {
		set, n := list[0].set, 1
		for n < len(list) && n < batchElements && list[n].set == set {
			n++
		}
		w.wireElements = w.wireElements[:0]
		for i := range list[:n] {
			w.wireElements = w.schemas[set].wire(&list[i], w.wireElements)
		}
		w.check(op(w.sets[set], w.wireElements), w.sets[set])
		list = list[n:]
	}
}

func (w *wire) add(list []element) {
	w.added += len(list)
	w.put(list, w.conn.SetAddElements)
}

func (w *wire) remove(list []element) { w.put(list, w.conn.SetDeleteElements) }
