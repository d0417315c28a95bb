package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	nft "github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"signalbox/proxier"
)

// legacy is a table that an earlier Proxier left, or this one. When it is
// replaced the affinity map stays, and so that what it holds goes on meaning the
// same, Service ports and endpoints keep the numbers that they have in it.
type legacy struct {
	chains []string
	sets   []string
	keeps  bool // the affinity map is there, and of the form that it has today
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
	return old, nil
}

// isAffinity says whether a set of the kernel's is the affinity map as it
// would be made today.
func (w *wire) isAffinity(s *nft.Set) bool {
	want := w.sets[affinity]
	return s.Name == want.Name && s.IsMap && s.Dynamic && s.HasTimeout && s.Size == want.Size &&
		s.KeyType.Bytes == want.KeyType.Bytes && s.DataType.Bytes == want.DataType.Bytes
}

// readRecords makes records of what the kernel's table says of the plan's
// Service ports with affinity. It asks for the elements that it needs: to dump a
// large map the kernel walks it from the start for every few hundred elements.
func (w *wire) readRecords(plan *proxier.Plan) (map[proxier.ServicePortName]*record, error) {
	var chains map[uint32]sizedChain
	records := make(map[proxier.ServicePortName]*record)
	for name, port := range plan.Services {
		if port.AffinityTimeout <= 0 {
			continue
		}
		var err error
		if chains == nil {
			if chains, err = w.readChains(); err != nil {
				return nil, err
			}
		}
		if records[name], err = w.readRecord(port, chains); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return records, nil
}

// readChains reads which number stands for which sized chain.
func (w *wire) readChains() (map[uint32]sizedChain, error) {
	elements, err := w.conn.GetSetElements(w.sets[pickChains])
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", schemas[pickChains].name, err)
	}
	chains := make(map[uint32]sizedChain)
	for _, e := range elements {
		verdict, err := netlink.NewAttributeDecoder(e.Val)
		if err != nil || len(e.Key) != 4 {
			continue
		}
		for verdict.Next() {
			if verdict.Type() == unix.NFTA_VERDICT_CHAIN {
				chains[binary.NativeEndian.Uint32(e.Key)] = parseChainName(verdict.String())
			}
		}
	}
	return chains, nil
}

// parseChainName reads what sizedChain.name writes, but for the timeout.
func parseChainName(name string) sizedChain {
	var c sizedChain
	name, c.large = strings.CutSuffix(name, "-large")
	if before, variant, found := strings.Cut(name, "-set-"); found {
		name = before
		c.variant, _ = strconv.Atoi(variant)
	}
	size, _, _ := strings.Cut(strings.TrimPrefix(name, "pick-"), "-")
	c.size, _ = strconv.Atoi(size)
	return c
}

// readRecord reads one Service port's block of ids and its endpoints' numbers;
// nil if the table knows none of its frontends or they had no affinity.
func (w *wire) readRecord(port *proxier.ServicePort, chains map[uint32]sizedChain) (*record, error) {
	ids, err := w.readIDs(port)
	if err != nil {
		return nil, err
	}
	var r *record
	for _, id := range ids {
		if id < smallFirst || id&idSpaceMask != idSpace {
			continue
		}
		block := id & blockMask(id >= largeFirst)
		if r == nil {
			r = &record{port: &proxier.ServicePort{Name: port.Name, AffinityTimeout: port.AffinityTimeout}, block: block}
		}
		if block != r.block {
			continue
		}
		set, err := w.readSet(block, chains[id&chainMask])
		if err != nil {
			return nil, err
		}
		r.sets = append(r.sets, set)
	}
	return r, nil
}

// readIDs reads the different ids that the Service port's frontends lead to.
func (w *wire) readIDs(port *proxier.ServicePort) ([]uint32, error) {
	keys := make(map[setID][]string)
	for i := range port.Frontends {
		fe := &port.Frontends[i]
		sets, key := addressedSets, frontendBytes(fe.Key(port.Name.Protocol))
		if !fe.Addr.IsValid() {
			sets = nodePortSets
		}
		keys[sets.external] = append(keys[sets.external], key)
		if fe.Internal != fe.External {
			keys[sets.internal] = append(keys[sets.internal], key)
		}
	}
	var ids []uint32
	for _, set := range []setID{frontends, internalFrontends, nodePorts, internalNodePorts} {
		found, err := w.find(set, keys[set])
		if err != nil {
			return nil, err
		}
		for _, val := range found {
			if len(val) == 4 {
				ids = append(ids, binary.BigEndian.Uint32([]byte(val)))
			}
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// readSet reads the endpoints of one of a block's sets with their numbers.
func (w *wire) readSet(block uint32, c sizedChain) (numberedSet, error) {
	set := numberedSet{EndpointSet: &proxier.EndpointSet{}, base: block}
	if c.variant < 0 || c.variant >= maxVariants {
		return set, nil
	}
	var slots, ids []string
	for slot := range c.size {
		slots = append(slots, slotKey(block|uint32(c.variant), slot))
	}
	numbers, err := w.find(affinitySlots, slots)
	if err != nil {
		return set, err
	}
	for _, slot := range slots {
		if number := numbers[slot]; len(number) == 4 {
			ids = append(ids, idKey(binary.BigEndian.Uint32([]byte(number))))
		}
	}
	addrs, err := w.find(affinityEndpoints+setID(c.variant), ids)
	if err != nil {
		return set, err
	}
	for _, id := range ids {
		val := []byte(addrs[id])
		if len(val) != w.addrLen+4 {
			continue
		}
		addr, _ := netip.AddrFromSlice(val[:w.addrLen])
		set.Endpoints = append(set.Endpoints, proxier.Endpoint{
			AddrPort: netip.AddrPortFrom(addr, binary.BigEndian.Uint16(val[w.addrLen:])),
		})
		set.numbers = append(set.numbers, binary.NativeEndian.Uint32([]byte(id))&(endpointFlag(block >= largeFirst)-1))
	}
	return set, nil
}

// findElements is how many elements are asked for at once. The kernel answers
// each with a page, and the answers must fit into a socket's usual buffer.
const findElements = 24

// find reads the data of those of the keys that are in the kernel's map.
func (w *wire) find(set setID, keys []string) (map[string]string, error) {
	data := make(map[string]string, len(keys))
	for chunk := range slices.Chunk(keys, findElements) {
		err := w.findChunk(set, chunk, data)
		if !errors.Is(err, unix.ENOENT) {
			if err != nil {
				return nil, err
			}
			continue
		}
		// One is missing, and the kernel went no further.
		for i := range chunk {
			if err := w.findChunk(set, chunk[i:i+1], data); err != nil && !errors.Is(err, unix.ENOENT) {
				return nil, err
			}
		}
	}
	return data, nil
}

func (w *wire) findChunk(set setID, keys []string, data map[string]string) error {
	query := make([]nft.SetElement, len(keys))
	for i, key := range keys {
		query[i].Key = []byte(key)
	}
	found, err := w.conn.FindSetElements(w.sets[set], query)
	if err != nil {
		return fmt.Errorf("read %s: %w", schemas[set].name, err)
	}
	for _, e := range found {
		data[string(e.Key)] = string(e.Val)
	}
	return nil
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
