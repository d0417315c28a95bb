package proxier

import (
	"cmp"
	"slices"

	"signalbox/internal/compact"
)

// claims says which Service port serves each frontend of a Plan. Two can claim
// one: a NodePort or an external IP in manifests, or an address in the moment
// in which it passes from one Service to the next. The best claim has it, and
// that follows from the claims alone, not from the order they came in.
type claims struct {
	owners map[FrontendKey]claim    // frontend -> who serves it
	losers map[FrontendKey][]*claim // frontend -> who else claims it, best first; few frontends have any
	// See compact.Map.
	mostOwners, mostLosers int
}

// claim is a Service port's wish to serve one frontend.
type claim struct {
	by    ServicePortName
	kind  FrontendKind
	since int64 // creation of the Service in Unix seconds; 0 where unknown
}

// wish is a claim and what it is for.
type wish struct {
	key   FrontendKey
	claim claim
}

func newClaims() claims {
	return claims{owners: map[FrontendKey]claim{}, losers: map[FrontendKey][]*claim{}}
}

// compare puts the better claim first. Cluster IPs are given out by the API
// server, so that nobody can take another's by naming it as an external IP;
// then the older Service has it, then the name that sorts first.
func (c claim) compare(o claim) int {
	return cmp.Or(
		cmp.Compare(min(c.kind, ExternalIP), min(o.kind, ExternalIP)),
		cmp.Compare(c.since, o.since),
		c.by.Compare(o.by),
		cmp.Compare(c.kind, o.kind),
	)
}

func (c *claims) has(w wish) bool { return c.owners[w.key] == w.claim }

// exchange replaces the wishes of a Service. It returns the other Services
// that gained or lost a frontend by it, sorted. These wish for what they did
// before, so that exchanging their wishes affects nobody: a change of claims
// is settled after one step, whoever claims what.
func (c *claims) exchange(name ServiceName, before, after []wish) (affected []ServiceName) {
	if slices.Equal(before, after) {
		return nil
	}
	was := make(map[FrontendKey]ServicePortName, len(after))
	for _, wishes := range [][]wish{before, after} {
		for _, w := range wishes {
			was[w.key] = c.owners[w.key].by
		}
	}
	for _, w := range before {
		c.withdraw(w)
	}
	for _, w := range after {
		c.enter(w)
	}
	c.owners, c.losers = compact.Map(c.owners, &c.mostOwners), compact.Map(c.losers, &c.mostLosers)
	for key, previous := range was {
		now := c.owners[key].by
		if now == previous {
			continue
		}
		for _, other := range []ServiceName{previous.ServiceName, now.ServiceName} {
			if other != name && other != (ServiceName{}) {
				affected = append(affected, other)
			}
		}
	}
	slices.SortFunc(affected, ServiceName.Compare)
	return slices.Compact(affected)
}

func (c *claims) enter(w wish) {
	owner, taken := c.owners[w.key]
	switch {
	case !taken:
		c.owners[w.key] = w.claim
		return
	case w.claim.compare(owner) < 0:
		c.owners[w.key] = w.claim
		w.claim = owner
	}
	queue := c.losers[w.key]
	i, _ := findClaim(queue, w.claim)
	c.losers[w.key] = slices.Insert(queue, i, &w.claim)
}

func (c *claims) withdraw(w wish) {
	queue := c.losers[w.key]
	i, found := 0, false
	switch {
	case !c.has(w):
		if i, found = findClaim(queue, w.claim); !found {
			return
		}
	case len(queue) == 0:
		delete(c.owners, w.key)
		return
	default:
		c.owners[w.key] = *queue[0]
	}
	if len(queue) == 1 {
		delete(c.losers, w.key)
		return
	}
	c.losers[w.key] = slices.Delete(queue, i, i+1)
}

func findClaim(queue []*claim, c claim) (int, bool) {
	return slices.BinarySearchFunc(queue, c, func(x *claim, y claim) int { return x.compare(y) })
}
