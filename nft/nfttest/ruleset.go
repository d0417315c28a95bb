// SPDX-License-Identifier: Apache-2.0

package nfttest

import (
	"maps"
	"slices"
	"syscall"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ruleset is all that the kernel holds.
type ruleset struct {
	objects map[objectID]*object
	made    int // objects since the start
}

// objectID names a table, chain, set or counter. kind is that of the message which makes it.
type objectID struct {
	family byte
	table  string
	kind   int
	name   string // empty for a table
}

// object is a table, chain, set or counter.
type object struct {
	number  int    // the order of listings is that in which objects were made
	message []byte // the request that made it, with which listings answer
	isBase  bool   // a base chain
	rules   []rule // of a chain
	set            // if it is one
}

type rule struct {
	message []byte
	refs    []objectID // these cannot be deleted
}

// clone copies what a transaction may change.
func (r ruleset) clone() ruleset {
	objects := make(map[objectID]*object, len(r.objects))
	for id, o := range r.objects {
		copied := *o
		copied.rules, copied.elements = slices.Clone(o.rules), maps.Clone(o.elements)
		objects[id] = &copied
	}
	return ruleset{objects, r.made}
}

// transaction is a copy of the ruleset with the changes so far.
type transaction struct {
	ruleset
	changed bool
}

// apply performs one message.
func (t *transaction) apply(m netlink.Message) syscall.Errno {
	table, request := head(m)
	if kindOf(m) != unix.NFT_MSG_NEWTABLE && t.objects[table] == nil {
		return unix.ENOENT
	}
	chain := table.of(unix.NFT_MSG_NEWCHAIN, request.text(unix.NFTA_CHAIN_NAME))
	set := table.of(unix.NFT_MSG_NEWSET, request.text(unix.NFTA_SET_NAME))
	counter := table.of(unix.NFT_MSG_NEWOBJ, request.text(unix.NFTA_OBJ_NAME))
	switch kindOf(m) {
	case unix.NFT_MSG_NEWTABLE:
		return t.add(table, &object{}, m)
	case unix.NFT_MSG_NEWCHAIN:
		return t.add(chain, &object{isBase: request[unix.NFTA_CHAIN_HOOK] != nil}, m)
	case unix.NFT_MSG_NEWSET:
		return t.add(set, &object{set: newSet(request)}, m)
	case unix.NFT_MSG_NEWOBJ:
		return t.add(counter, &object{}, m)
	case unix.NFT_MSG_DELTABLE:
		maps.DeleteFunc(t.objects, func(id objectID, _ *object) bool { return id.table == table.table && id.family == table.family })
		t.changed = true
		return 0
	case unix.NFT_MSG_DELCHAIN:
		return t.remove(chain)
	case unix.NFT_MSG_DELSET:
		return t.remove(set)
	case unix.NFT_MSG_DELOBJ:
		return t.remove(counter)
	case unix.NFT_MSG_NEWRULE:
		return t.addRule(table.of(unix.NFT_MSG_NEWCHAIN, request.text(unix.NFTA_RULE_CHAIN)), request, m)
	case unix.NFT_MSG_DELRULE:
		return t.flushChains(table.of(unix.NFT_MSG_NEWCHAIN, request.text(unix.NFTA_RULE_CHAIN)))
	case unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
		return t.changeElements(set, request, m)
	}
	return unix.EINVAL
}

// of names an object of the same table.
func (id objectID) of(kind int, name string) objectID {
	return objectID{id.family, id.table, kind, name}
}

func (t *transaction) add(id objectID, o *object, m netlink.Message) syscall.Errno {
	if t.objects[id] != nil {
		// Linux counts an update without content as a change.
		t.changed = t.changed || id.kind == unix.NFT_MSG_NEWCHAIN || id.kind == unix.NFT_MSG_NEWSET
		if m.Header.Flags&netlink.Excl != 0 {
			return unix.EEXIST
		}
		return 0
	}
	t.made++
	o.number, o.message = t.made, m.Data
	if id.kind == unix.NFT_MSG_NEWSET {
		o.message = without(m.Data, unix.NFTA_SET_ID) // it counts within the transaction
	}
	t.objects[id], t.changed = o, true
	return 0
}

func (t *transaction) remove(id objectID) syscall.Errno {
	o := t.objects[id]
	if o == nil {
		return unix.ENOENT
	}
	o.rules = nil // they go with their chain, and what they refer to is free
	if t.isUsed(id) {
		return unix.EBUSY
	}
	delete(t.objects, id)
	t.changed = true
	return 0
}

// isUsed says whether a rule or an element refers to the object.
func (t *transaction) isUsed(used objectID) bool {
	for id, o := range t.objects {
		if slices.ContainsFunc(o.rules, func(r rule) bool { return slices.Contains(r.refs, used) }) {
			return true
		}
		for _, e := range o.elements {
			if e.chain != "" && id.of(unix.NFT_MSG_NEWCHAIN, e.chain) == used {
				return true
			}
		}
	}
	return false
}

func (t *transaction) addRule(chain objectID, request attributes, m netlink.Message) syscall.Errno {
	c := t.objects[chain]
	if c == nil {
		return unix.ENOENT
	}
	refs := chain.references(request[unix.NFTA_RULE_EXPRESSIONS])
	for _, id := range refs {
		if errno := t.mayRefer(id); errno != 0 {
			return errno
		}
	}
	c.rules, t.changed = append(c.rules, rule{m.Data, refs}), true
	return 0
}

// mayRefer says whether a rule or an element may refer to the object.
func (t *transaction) mayRefer(id objectID) syscall.Errno {
	switch o := t.objects[id]; {
	case o == nil:
		return unix.ENOENT
	case o.isBase:
		return unix.EOPNOTSUPP
	}
	return 0
}

// references lists what a rule's expressions refer to.
func (id objectID) references(expressions []byte) (refs []objectID) {
	for _, e := range unmarshal(expressions) {
		expression := parse(e.Data)
		data := parse(expression[unix.NFTA_EXPR_DATA])
		switch expression.text(unix.NFTA_EXPR_NAME) {
		case "lookup", "dynset": // NFTA_DYNSET_SET_NAME is the same number
			refs = append(refs, id.of(unix.NFT_MSG_NEWSET, data.text(unix.NFTA_LOOKUP_SET)))
		case "objref":
			refs = append(refs, id.of(unix.NFT_MSG_NEWOBJ, data.text(unix.NFTA_OBJREF_IMM_NAME)))
		case "immediate":
			if chain := verdictChain(data[unix.NFTA_IMMEDIATE_DATA]); chain != "" {
				refs = append(refs, id.of(unix.NFT_MSG_NEWCHAIN, chain))
			}
		}
	}
	return refs
}

// flushChains deletes the rules of a chain, or of all chains if the name is empty.
func (t *transaction) flushChains(chain objectID) syscall.Errno {
	if chain.name != "" && t.objects[chain] == nil {
		return unix.ENOENT
	}
	for id, o := range t.objects {
		if id == chain || chain.name == "" && id.of(chain.kind, "") == chain {
			t.changed = t.changed || len(o.rules) > 0
			o.rules = nil
		}
	}
	return 0
}
