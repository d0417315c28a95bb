// SPDX-License-Identifier: Apache-2.0

package access

import (
	"cmp"
	"slices"

	"signalbox/nft"
)

// Elements compares the elements of Service ports before and after a change. Of a
// shared set it counts the holders of each element, because the table has an element
// while it has a holder. Elements of shared sets have no data and are no intervals.
type Elements struct {
	sets    []*nft.Set
	holders map[sharedElement]int32
	length  int
}

type sharedElement struct {
	set nft.SetID
	key string
}

// NewElements counts nothing yet. The sets are those of the table, by their place.
func NewElements(sets []*nft.Set) *Elements {
	return &Elements{sets: sets, holders: make(map[sharedElement]int32)}
}

// Add counts a holder while all elements are compiled. It says whether the element is
// to be written: an element of a shared set is written once.
func (e *Elements) Add(element *nft.Element) (write bool) {
	if e.sets[element.Set].Shared {
		shared := sharedElement{element.Set, element.Key}
		e.holders[shared]++
		if e.holders[shared] > 1 {
			return false
		}
	}
	e.length++
	return true
}

// Len is the number of elements in the table.
func (e *Elements) Len() int { return e.length }

// Difference is what a change writes: first Remove, then Add. Both are sorted by set.
type Difference struct {
	Remove, Add []nft.Element
	holders     map[sharedElement]int32 // as they will be
}

// Compare finds what changes when the Service ports of a batch had the elements in
// before and get those in after. An element can go from one Service port to another.
// Nothing is counted until Commit.
func (e *Elements) Compare(before, after []nft.Element) *Difference {
	d := &Difference{holders: make(map[sharedElement]int32)}
	for _, c := range pair(before, after) {
		had, has := c.old != nil, c.new != nil
		same := had && has && *c.old == *c.new
		if e.sets[c.id.Set].Shared {
			shared := sharedElement{c.id.Set, c.id.Key}
			holders := e.holders[shared]
			had, has = holders > 0, holders+c.more > 0
			same = had && has
			d.holders[shared] = holders + c.more
		}
		if had && !same {
			d.Remove = append(d.Remove, *c.old)
		}
		if has && !same {
			d.Add = append(d.Add, *c.new)
		}
	}
	bySet := func(a, b nft.Element) int { return cmp.Compare(a.Set, b.Set) }
	slices.SortStableFunc(d.Remove, bySet)
	slices.SortStableFunc(d.Add, bySet)
	return d
}

// Commit counts a difference that the kernel has.
func (e *Elements) Commit(d *Difference) {
	e.length += len(d.Add) - len(d.Remove)
	for shared, holders := range d.holders {
		if holders > 0 {
			e.holders[shared] = holders
		} else {
			delete(e.holders, shared)
		}
	}
}

// change is what happens to one element.
type change struct {
	id       nft.ElementID
	old, new *nft.Element // nil for none
	more     int32        // holders; negative for fewer
}

// pair lists the elements of both lists in the order in which they first occur.
func pair(before, after []nft.Element) (changes []change) {
	places := make(map[nft.ElementID]int, len(after))
	changeOf := func(id nft.ElementID) *change {
		i, known := places[id]
		if !known {
			i = len(changes)
			places[id] = i
			changes = append(changes, change{id: id})
		}
		return &changes[i]
	}
	for i := range before {
		c := changeOf(before[i].ID())
		c.old, c.more = &before[i], c.more-1
	}
	for i := range after {
		c := changeOf(after[i].ID())
		c.new, c.more = &after[i], c.more+1
	}
	return changes
}
