package userspace

import (
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// relayed says whether the relay serves a protocol. SCTP it does not: a
// relay would lose the message boundaries, streams and addresses that SCTP is
// used for.
func relayed(p plan.Protocol) bool { return p == plan.TCP || p == plan.UDP }

// compile lists the elements of one Service port. Elements of cluster-ips may
// be those of other Service ports too.
func compile(f *nft.IPFamily, sp *plan.ServicePort, ids map[plan.FrontendKey]frontendID) []nft.Element {
	c := compiler{family: f, comment: nft.CommentText(sp.Name.String())}
	for i := range sp.Frontends {
		fe := &sp.Frontends[i]
		c.frontend(fe, fe.Key(sp.Name.Protocol), ids)
	}
	return c.list
}

type compiler struct {
	family  *nft.IPFamily
	comment string
	list    []nft.Element
}

func (c *compiler) add(set nft.SetID, key, data, comment string) {
	c.list = append(c.list, nft.Element{Set: set, Key: key, Data: data, Comment: comment})
}

func (c *compiler) frontend(fe *plan.Frontend, k plan.FrontendKey, ids map[plan.FrontendKey]frontendID) {
	sets := addressedSets
	if !fe.Addr.IsValid() {
		sets = nodePortSets
	}
	key := access.FrontendBytes(k)
	open := relayed(k.Protocol)
	inside, outside := open && fe.Internal.Len() > 0, open && fe.External.Len() > 0
	if inside || outside {
		c.add(sets.redirected, key, string(ids[k].addr(c.family.Family).AsSlice()), c.comment)
		if !inside {
			c.add(sets.noInternalEndpoints, key, "", "")
		}
		if !outside {
			c.add(sets.noExternalEndpoints, key, "", "")
		}
	}
	if !inside || !outside {
		set := sets.rejected
		if fe.WhenEmpty == plan.Drop && open {
			set = sets.dropped
		}
		c.add(set, key, "", c.comment)
	}
	access.SourceElements(fe, k.Protocol, func(e nft.Element) { c.list = append(c.list, e) })
	if fe.Kind == plan.ClusterIP && fe.Addr.IsValid() {
		c.add(clusterIPs, string(fe.Addr.AsSlice()), "", "")
	}
}
