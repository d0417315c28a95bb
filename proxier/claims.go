package proxier

import "slices"

// claims says which Service port each frontend of a Plan belongs to. Two
// Services can claim one (a NodePort or an external IP in a manifest, or in
// the moment in which an address passes from one Service to the next): one of
// them gets it, the others wait until it is free.
type claims struct {
	owners map[FrontendKey]claim
	// waiting and queue are two views of one relation: which keys a Service
	// could not get, and which Services could not get a key.
	waiting map[ServiceName][]FrontendKey
	queue   map[FrontendKey][]ServiceName
}

type claim struct {
	by    ServicePortName
	since int64 // creation of the Service in Unix seconds; 0 where unknown
}

func newClaims() claims {
	return claims{map[FrontendKey]claim{}, map[ServiceName][]FrontendKey{}, map[FrontendKey][]ServiceName{}}
}

// take gives key to c, or says who keeps it. A later claim loses its key to an
// earlier one: displaced then names the Service to resolve again.
func (c *claims) take(key FrontendKey, by claim) (holder claim, displaced ServiceName, ok bool) {
	owner, taken := c.owners[key]
	switch {
	case !taken || owner.by == by.by:
	case by.precedes(owner):
		displaced = owner.by.ServiceName
	default:
		return owner, ServiceName{}, false
	}
	c.owners[key] = by
	return by, displaced, true
}

// release frees key if port holds it.
func (c *claims) release(key FrontendKey, port ServicePortName) {
	if c.owners[key].by == port {
		delete(c.owners, key)
	}
}

// wait notes that a Service could not get key.
func (c *claims) wait(name ServiceName, key FrontendKey) {
	c.waiting[name] = append(c.waiting[name], key)
	c.queue[key] = append(c.queue[key], name)
}

// stopWaiting forgets what a Service waits for and returns it.
func (c *claims) stopWaiting(name ServiceName) []FrontendKey {
	keys := c.waiting[name]
	delete(c.waiting, name)
	for _, key := range keys {
		c.queue[key] = slices.DeleteFunc(c.queue[key], func(n ServiceName) bool { return n == name })
		if len(c.queue[key]) == 0 {
			delete(c.queue, key)
		}
	}
	return keys
}
