package nftables

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	nft "github.com/google/nftables"

	"signalbox/proxier"
)

// legacy is a table that an earlier Proxier left, or this one. When it is
// replaced the affinity map stays, and so that what it holds goes on meaning the
// same, Service ports and endpoints keep the numbers that they have in it.
type legacy struct {
	chains []string
	sets   []string
	keeps  bool // the affinity map is there, and of the form that it has today
	// blocks says which block of ids a frontend leads to.
	blocks map[proxier.FrontendKey]uint32
	// numbered lists the endpoints with their numbers, by block.
	numbered map[uint32]numberedSet
}

// survey reads what there is to take over; nil if there is no table.
func (w *wire) survey() (*legacy, error) {
	tables, err := w.conn.ListTablesOfFamily(w.family.table)
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	if !slices.ContainsFunc(tables, func(t *nft.Table) bool { return t.Name == w.table.Name }) {
		return nil, nil
	}
	old := &legacy{blocks: make(map[proxier.FrontendKey]uint32), numbered: make(map[uint32]numberedSet)}
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
	if !old.keeps {
		return old, nil
	}
	return old, w.readNumbers(old)
}

// isAffinity says whether a set of the kernel's is the affinity map as it
// would be made today.
func (w *wire) isAffinity(s *nft.Set) bool {
	want := w.sets[affinity]
	return s.Name == want.Name && s.IsMap && s.Dynamic && s.HasTimeout && s.Size == want.Size &&
		s.KeyType.Bytes == want.KeyType.Bytes && s.DataType.Bytes == want.DataType.Bytes
}

// readNumbers reads the numbers of Service ports with affinity. Where there are
// none, it costs next to nothing.
func (w *wire) readNumbers(old *legacy) error {
	for v := range maxVariants {
		elements, err := w.elements(old, affinityEndpoints+setID(v))
		if err != nil {
			return err
		}
		for _, e := range elements {
			old.addEndpoint(w.family, e)
		}
	}
	if len(old.numbered) == 0 {
		return nil
	}
	for _, set := range []setID{frontends, internalFrontends, nodePorts, internalNodePorts} {
		elements, err := w.elements(old, set)
		if err != nil {
			return err
		}
		for _, e := range elements {
			if len(e.Val) != 4 {
				continue
			}
			if id := binary.BigEndian.Uint32(e.Val); id >= smallFirst && id&idSpaceMask == idSpace {
				old.blocks[frontendOf(w.family, schemas[set].key, e.Key)] = id & blockMask(id >= largeFirst)
			}
		}
	}
	return nil
}

func (w *wire) elements(old *legacy, set setID) ([]nft.SetElement, error) {
	if !slices.Contains(old.sets, schemas[set].name) {
		return nil, nil
	}
	elements, err := w.conn.GetSetElements(w.sets[set])
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", schemas[set].name, err)
	}
	return elements, nil
}

// addEndpoint notes an element of affinity-endpoints.
func (old *legacy) addEndpoint(f *family, e nft.SetElement) {
	if len(e.Key) != 4 || len(e.Val) != f.addrLen+4 {
		return
	}
	id := binary.NativeEndian.Uint32(e.Key)
	large := id >= largeFirst
	addr, _ := netip.AddrFromSlice(e.Val[:f.addrLen])
	endpoint := proxier.Endpoint{AddrPort: netip.AddrPortFrom(addr, binary.BigEndian.Uint16(e.Val[f.addrLen:]))}
	block := id & blockMask(large)
	set := old.numbered[block]
	if set.EndpointSet == nil {
		set = numberedSet{EndpointSet: &proxier.EndpointSet{}, base: block}
	}
	set.Endpoints = append(set.Endpoints, endpoint)
	set.numbers = append(set.numbers, id&(endpointFlag(large)-1))
	old.numbered[block] = set
}

// frontendOf reads a key of a map by frontend or node port.
func frontendOf(f *family, fields []fieldType, key []byte) proxier.FrontendKey {
	var k proxier.FrontendKey
	for _, field := range fields {
		n := field.size(f)
		if len(key) < n {
			return proxier.FrontendKey{}
		}
		switch field {
		case addrField:
			k.Addr, _ = netip.AddrFromSlice(key[:n])
		case protoField:
			k.Protocol = proxier.Protocol(key[0])
		case portField:
			k.Port = binary.BigEndian.Uint16(key)
		}
		key = key[n:]
	}
	return k
}

// adopt makes a record of what the table says of each Service port with
// affinity that it knows, and takes the blocks out of the pools.
func (old *legacy) adopt(plan *proxier.Plan, names []proxier.ServicePortName, pools *idPools) map[proxier.ServicePortName]*record {
	if old == nil || len(old.blocks) == 0 {
		return nil
	}
	adopted := make(map[proxier.ServicePortName]*record)
	for _, name := range names {
		port := plan.Services[name]
		if port.AffinityTimeout <= 0 {
			continue
		}
		for i := range port.Frontends {
			block, known := old.blocks[port.Frontends[i].Key(name.Protocol)]
			if known && pools.of(block).claim(block) {
				adopted[name] = &record{
					port:  &proxier.ServicePort{Name: name, AffinityTimeout: port.AffinityTimeout},
					sets:  []numberedSet{old.numbered[block]},
					block: block,
				}
				break
			}
		}
	}
	return adopted
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
