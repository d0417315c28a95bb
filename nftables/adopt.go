package nftables

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	nft "github.com/google/nftables"

	"signalbox/proxier/plan"
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
func (w *wire) survey() (*legacy, error) {
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
		old.keeps = old.keeps || w.isAffinity(s)
	}
	objects, err := w.conn.GetNamedObjects(w.table)
	if err != nil {
		return nil, fmt.Errorf("list counters: %w", err)
	}
	for _, o := range objects {
		if c, ok := o.(*nft.NamedObj); ok && c.Type == nft.ObjTypeCounter {
			old.counters = append(old.counters, c.Name)
		}
	}
	return old, nil
}

// isAffinity says whether a set of the kernel's is the affinity map as it
// would be made today.
func (w *wire) isAffinity(s *nft.Set) bool {
	want := w.sets[affinity]
	return s.Name == want.Name && s.IsMap && s.Dynamic && s.HasTimeout && s.Size == want.Size &&
		s.KeyType.Bytes == want.KeyType.Bytes && s.DataType.Bytes == want.DataType.Bytes
}

// clear removes the old table's contents; of the sets only the affinity map
// stays, with all that it holds.
func (w *wire) clear(old *legacy) {
	w.conn.FlushTable(w.table)
	for _, name := range old.sets {
		if name != schemas[affinity].name {
			w.conn.DelSet(&nft.Set{Table: w.table, Name: name})
		}
	}
	for _, name := range old.chains {
		w.conn.DelChain(&nft.Chain{Table: w.table, Name: name})
	}
}

// frontendOf reads a key of a map by frontend or node port.
func frontendOf(f *family, fields []fieldType, key []byte) plan.FrontendKey {
	var k plan.FrontendKey
	for _, field := range fields {
		n := field.size(f)
		if len(key) < n {
			return plan.FrontendKey{}
		}
		switch field {
		case addrField:
			k.Addr, _ = netip.AddrFromSlice(key[:n])
		case protoField:
			k.Protocol = plan.Protocol(key[0])
		case portField:
			k.Port = binary.BigEndian.Uint16(key)
		}
		key = key[n:]
	}
	return k
}
