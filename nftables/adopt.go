package nftables

import (
	"fmt"

	nflib "github.com/google/nftables"
)

// legacy is a table that an earlier Proxier left, or this one. When it is
// replaced the affinity map stays, and so that what it holds goes on meaning the
// same, Service ports and endpoints keep the numbers that they have in it.
type legacy struct {
	chains   []string
	sets     []string
	counters []string
	keeps    bool // the affinity map is there, and of the form that it has today
}

// survey reads what there is to take over; nil if there is no table.
func survey(w *wire) (*legacy, error) {
	if exists, err := w.exists(); err != nil || !exists {
		return nil, err
	}
	old := &legacy{}
	chains, err := w.conn.ListChainsOfTableFamily(w.family.table)
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	for _, c := range chains {
		if c.Table.Name == w.table.Name {
			old.chains = append(old.chains, c.Name)
		}
	}
	sets, err := w.conn.GetSets(w.table)
	if err != nil {
		return nil, fmt.Errorf("list sets: %w", err)
	}
	for _, s := range sets {
		old.sets = append(old.sets, s.Name)
		old.keeps = old.keeps || isAffinity(w, s)
	}
	objects, err := w.conn.GetNamedObjects(w.table)
	if err != nil {
		return nil, fmt.Errorf("list counters: %w", err)
	}
	for _, o := range objects {
		if c, ok := o.(*nflib.NamedObj); ok && c.Type == nflib.ObjTypeCounter {
			old.counters = append(old.counters, c.Name)
		}
	}
	return old, nil
}

// isAffinity says whether a set of the kernel's is the affinity map as it
// would be made today.
func isAffinity(w *wire, s *nflib.Set) bool {
	want := w.sets[affinity]
	return s.Name == want.Name && s.IsMap && s.Dynamic && s.HasTimeout && s.Size == want.Size &&
		s.KeyType.Bytes == want.KeyType.Bytes && s.DataType.Bytes == want.DataType.Bytes
}

// clearTable removes the old table's contents; of the sets only the affinity map
// stays, with all that it holds.
func clearTable(w *wire, old *legacy) {
	w.conn.FlushTable(w.table)
	for _, name := range old.sets {
		if name != schemas[affinity].name {
			w.conn.DelSet(&nflib.Set{Table: w.table, Name: name})
		}
	}
	for _, name := range old.chains {
		w.conn.DelChain(&nflib.Chain{Table: w.table, Name: name})
	}
}
