package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Contents is what the kernel has in a table.
type Contents struct {
	Chains   []string
	Sets     []*nftables.Set
	Counters []string
}

// Inspect lists what the kernel has in the table, except rules and elements. It returns
// nil if there is no table.
func (t *Table) Inspect() (*Contents, error) {
	if exists, err := t.Exists(); err != nil || !exists {
		return nil, err
	}
	var c Contents
	chains, err := t.conn.ListChainsOfTableFamily(t.IPFamily.Table)
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	for _, chain := range chains {
		if chain.Table.Name == t.table.Name {
			c.Chains = append(c.Chains, chain.Name)
		}
	}
	if c.Sets, err = t.conn.GetSets(t.table); err != nil {
		return nil, fmt.Errorf("list sets: %w", err)
	}
	objects, err := t.conn.GetNamedObjects(t.table)
	if err != nil {
		return nil, fmt.Errorf("list counters: %w", err)
	}
	for _, o := range objects {
		if n, ok := o.(*nftables.NamedObj); ok && n.Type == nftables.ObjTypeCounter {
			c.Counters = append(c.Counters, n.Name)
		}
	}
	return &c, nil
}

// HasDynamicMap says whether the kernel has the map, which packets fill, in the same
// form as Open declared it.
func (t *Table) HasDynamicMap(c *Contents, id SetID) bool {
	want := t.declared[id]
	return c != nil && slices.ContainsFunc(c.Sets, func(s *nftables.Set) bool {
		return s.Name == want.Name && s.IsMap && s.Dynamic && s.HasTimeout && s.Size == want.Size &&
			s.KeyType.Bytes == want.KeyType.Bytes && s.DataType.Bytes == want.DataType.Bytes
	})
}

// ReplaceContents replaces all chains and sets of an existing table, except one map that
// packets fill. The map keeps its elements.
func (t *Table) ReplaceContents(c *Contents, kept SetID) {
	t.conn.FlushTable(t.table)
	for _, s := range c.Sets {
		if s.Name != t.declared[kept].Name {
			t.conn.DelSet(&nftables.Set{Table: t.table, Name: s.Name})
		}
	}
	for _, name := range c.Chains {
		t.conn.DelChain(&nftables.Chain{Table: t.table, Name: name})
	}
	t.AddSets(kept)
}

// RuleCount is the number of rules of a chain; -1 if the kernel does not have it.
func (t *Table) RuleCount(chain string) (int, error) {
	rules, err := t.conn.GetRules(t.table, &nftables.Chain{Name: chain, Table: t.table})
	if errors.Is(err, unix.ENOENT) {
		return -1, nil
	}
	if err != nil {
		return 0, fmt.Errorf("list the rules of %s: %w", chain, err)
	}
	return len(rules), nil
}

// Read lists a set's elements in the kernel. It lists none if there is no such set.
func (t *Table) Read(id SetID) ([]nftables.SetElement, error) { return t.read(t.conn, id) }

// ReadAll hands out the elements of each set that packets do not fill, set by set.
func (t *Table) ReadAll(emit func(SetID, []nftables.SetElement)) error {
	conn, err := dialForReading(t.options)
	if err != nil {
		return err
	}
	defer refill()
	defer conn.CloseLasting()
	for i, s := range t.sets {
		if s.Dynamic {
			continue
		}
		elements, err := t.read(conn, SetID(i))
		if err != nil {
			return err
		}
		emit(SetID(i), elements)
	}
	return nil
}

func (t *Table) read(conn *nftables.Conn, id SetID) ([]nftables.SetElement, error) {
	elements, err := conn.GetSetElements(t.declared[id])
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", t.sets[id].Name, err)
	}
	return elements, nil
}

// CounterPackets is how many packets a named counter has counted.
func (t *Table) CounterPackets(name string) (uint64, error) {
	obj, err := t.conn.GetObject(t.counter(name))
	if err != nil {
		return 0, fmt.Errorf("read counter %s: %w", name, err)
	}
	if named, ok := obj.(*nftables.NamedObj); ok {
		if c, ok := named.Obj.(*expr.Counter); ok {
			return c.Packets, nil
		}
	}
	return 0, fmt.Errorf("read counter %s: the kernel answered with another object", name)
}

// dialForReading opens a connection for long listings. The kernel walks a map from its
// beginning for each page of a listing. A page is as large as the largest buffer that
// the socket ever offered, up to 32 KiB. The library offers 4 KiB: a listing of 100,000
// elements takes six times as long with such pages.
func dialForReading(options []nftables.ConnOption) (*nftables.Conn, error) {
	conn, err := dial(append(slices.Clip(options), nftables.WithSockOptions(largePages))...)
	if err != nil {
		return nil, fmt.Errorf("open netlink to nf_tables for reading: %w", err)
	}
	return conn, nil
}

// largePages offers a large buffer for one answer of the kernel.
func largePages(c *netlink.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil // a connection to an nfttest.Kernel is no socket
	}
	return errors.Join(raw.Control(func(fd uintptr) { err = askGeneration(int(fd)) }), err)
}

// askGeneration asks for the number of transactions. The kernel answers before the
// system call of the question returns.
func askGeneration(fd int) error {
	const size = unix.SizeofNlMsghdr + 4 // and struct nfgenmsg
	b := binary.NativeEndian.AppendUint32(nil, size)
	b = binary.NativeEndian.AppendUint16(b, unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST)
	b = append(b, make([]byte, size-len(b))...)
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("sendto: %w", err)
	}
	if _, _, err := unix.Recvfrom(fd, make([]byte, 64<<10), unix.MSG_DONTWAIT); err != nil {
		return fmt.Errorf("recvfrom: %w", err)
	}
	return nil
}
