package iptables

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"strings"
)

// In each table an empty chain bears, in its name, a digest of all that this
// mode has there. A new process that finds the digest of what it would write has
// nothing to write: the rules need not be read back, which the tools print in
// other words than they were given, each version in its own.

// markPrefix begins the names of these chains. It is one of those under which
// kube-proxy removes chains.
const markPrefix = clusterPrefix + "0D-"

// sum is a digest of things whose order does not matter, so that it can follow
// what comes and goes.
type sum [2]uint64

func (s *sum) add(o sum) {
	s[0] += o[0]
	s[1] += o[1]
}

func (s *sum) sub(o sum) {
	s[0] -= o[0]
	s[1] -= o[1]
}

// sums are those of each table.
type sums [tableCount]sum

func (s *sums) add(o sums) {
	for t := range s {
		s[t].add(o[t])
	}
}

// replace counts after in the place of before.
func (s *sums) replace(before, after sums) {
	for t := range s {
		s[t].sub(before[t])
		s[t].add(after[t])
	}
}

// digest sums up text that was written to it.
type digest struct{ text []byte }

func (d *digest) write(parts ...string) {
	for _, p := range parts {
		d.text = append(append(d.text, p...), 0)
	}
}

func (d *digest) sum() sum {
	if len(d.text) == 0 {
		return sum{}
	}
	h := sha256.Sum256(d.text)
	return sum{binary.BigEndian.Uint64(h[:]), binary.BigEndian.Uint64(h[8:])}
}

// sums are the digests of what a ServicePort has in each table.
func (p *program) sums() (s sums) {
	var d [tableCount]digest
	for t := range tableCount {
		for _, c := range p.chains[t] {
			d[t].write(c.name)
			d[t].write(c.rules...)
		}
	}
	for i := range p.items {
		it := &p.items[i]
		in := &d[treeShapes[it.tree].table]
		in.write(it.key.String(), treeShapes[it.tree].root)
		in.write(it.rules...)
	}
	for t := range tableCount {
		s[t] = d[t].sum()
	}
	return s
}

// treeFormat is to be counted up when trees with the same items get other
// chains.
const treeFormat = 2

// frameSums are the digests of what depends on no Service.
func (s *state) frameSums() (all sums) {
	for t := range tableCount {
		var d digest
		d.write(fmt.Sprint(treeFormat, fanOut, leafSize, maxSizeClass))
		for _, c := range s.frame[t] {
			d.write(c.name)
			d.write(c.rules...)
		}
		for _, tree := range s.trees {
			if tree.table == t {
				d.write(tree.root, tree.prefix)
				d.write(tree.tail...)
			}
		}
		all[t] = d.sum()
	}
	return all
}

// mark is the name of the chain that stands for what the table holds.
func (s *state) mark(t table, services sums) string {
	whole := services[t]
	whole.add(s.frameSums()[t])
	return fmt.Sprintf("%s%016x", markPrefix, whole[0]^whole[1])
}

// extent is how much of this mode's own there is in a table.
type extent struct{ chains, rules int }

// extentOf is that of a table written with edits.
func extentOf(edits []edit) (e extent) {
	for i := range edits {
		if !edits[i].gone {
			e.chains++
			e.rules += len(edits[i].rules)
		}
	}
	return e
}

// holds says whether a table that was listed is what the state was made to be:
// it bears its mark, and nothing was taken away or added since.
func (s *state) holds(t table, l *listing) bool {
	marks := 0
	for _, name := range l.chains {
		if strings.HasPrefix(name, markPrefix) {
			marks++
			if name != s.marks[t] {
				return false
			}
		}
	}
	return marks == 1 && l.own == s.extents[t]
}
