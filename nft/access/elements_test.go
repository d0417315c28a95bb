// SPDX-License-Identifier: Apache-2.0

package access

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"signalbox/nft"
)

// The sets of these tests: keys is shared, data is a map by key.
const (
	data nft.SetID = iota
	keys
)

var testSets = []*nft.Set{data: {Name: "data"}, keys: {Name: "keys", Shared: true}}

// parse reads elements such as "a=1 b" : of data, with a datum, or of keys.
func parse(text string) (list []nft.Element) {
	for _, word := range strings.Fields(text) {
		e := nft.Element{Set: keys, Key: word}
		if key, datum, found := strings.Cut(word, "="); found {
			e = nft.Element{Set: data, Key: key, Data: datum}
		}
		list = append(list, e)
	}
	return list
}

func text(list []nft.Element) string {
	words := make([]string, len(list))
	for i, e := range list {
		words[i] = e.Key
		if e.Data != "" {
			words[i] += "=" + e.Data
		}
	}
	return strings.Join(words, " ")
}

func TestCompare(t *testing.T) {
	for _, test := range []struct{ name, others, before, after, remove, add string }{
		{"nothing changes", "", "a=1 b", "a=1 b", "", ""},
		{"new Service port", "", "", "b a=1", "", "a=1 b"},
		{"Service port goes", "", "b a=1", "", "a=1 b", ""},
		{"other data", "", "a=1 b", "a=2 b", "a=1", "a=2"},
		{"frontend goes to another Service port", "", "a=1 c=5", "c=6 a=2", "a=1 c=5", "a=2 c=6"},
		{"another holds the key", "b", "b", "", "", ""},
		{"another gets the key", "b", "", "b", "", ""},
		{"two of the batch hold the key", "", "", "b b", "", "b"},
		{"one of two lets the key go", "", "b b", "b", "", ""},
		{"both let the key go", "", "b b", "", "b", ""},
		{"the order stays", "", "", "z=1 y a=1 x", "", "z=1 a=1 y x"},
	} {
		t.Run(test.name, func(t *testing.T) {
			e := NewElements(testSets)
			for _, held := range parse(test.others + " " + test.before) {
				e.Add(&held)
			}
			counts := maps.Clone(e.holders)
			d := e.Compare(parse(test.before), parse(test.after))
			if remove, add := text(d.Remove), text(d.Add); remove != test.remove || add != test.add {
				t.Errorf("remove %q and add %q, want %q and %q", remove, add, test.remove, test.add)
			}
			if !maps.Equal(e.holders, counts) {
				t.Error("Compare counted")
			}
			e.Commit(d)
			fresh := NewElements(testSets)
			for _, held := range parse(test.others + " " + test.after) {
				fresh.Add(&held)
			}
			if !maps.Equal(e.holders, fresh.holders) {
				t.Errorf("counts %v, want %v", e.holders, fresh.holders)
			}
		})
	}
}

// TestChangesAddUp: after many changes, some of which the kernel refuses, the table has
// the elements of all Service ports.
func TestChangesAddUp(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	e, ports, table := NewElements(testSets), make([][]nft.Element, 5), map[nft.ElementID]nft.Element{}
	for round := range 2000 {
		// Each Service port has a=, b= ... of its own, and keys that others have too.
		i := random.IntN(len(ports))
		var now []nft.Element
		for range random.IntN(4) {
			now = append(now, parse(fmt.Sprintf("%d=%d %d", i, round%3, random.IntN(3)))...)
		}
		d := e.Compare(ports[i], now)
		if random.IntN(4) == 0 {
			continue
		}
		e.Commit(d)
		ports[i] = now
		for _, gone := range d.Remove {
			if table[gone.ID()] != gone {
				t.Fatalf("round %d: %v is removed and not there", round, gone)
			}
			delete(table, gone.ID())
		}
		for _, added := range d.Add {
			if _, there := table[added.ID()]; there {
				t.Fatalf("round %d: %v is added and there already", round, added)
			}
			table[added.ID()] = added
		}
		want := map[nft.ElementID]nft.Element{}
		for _, held := range slices.Concat(ports...) {
			want[held.ID()] = held
		}
		if !maps.Equal(table, want) || e.Len() != len(want) {
			t.Fatalf("round %d: the table has %v, %d counted, want %v", round, table, e.Len(), want)
		}
	}
}
