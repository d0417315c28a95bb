// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"context"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"signalbox/nft"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// BenchmarkDirect measures connections that use no Service, on a node that serves
// 10,000 of them. "ratio" is the median time of connect(2) divided by that on a node
// whose table has the same hooks and no rules for packets to meet; connections to the
// two take turns.
func BenchmarkDirect(b *testing.B) {
	for _, f := range plan.Families {
		for _, way := range directWays {
			b.Run(f.String()+"/"+way.name, func(b *testing.B) {
				empty, serving := newLab(b, f), newLab(b, f)
				empty.hookOnly()
				desired := conformance.Fleet(f, 10_000, 1)
				desired.Node.NodePortAddrs = serving.plan().Node.NodePortAddrs
				serving.must(netns.Set(serving.node))
				p := newProxier(b, f)
				serving.must(p.Sync(context.Background(), desired, plan.Change{All: true}))
				var times [2][]time.Duration
				for b.Loop() {
					for i, l := range []*lab{empty, serving} {
						times[i] = append(times[i], way.connect(l))
					}
				}
				without, with := median(times[0]), median(times[1])
				b.ReportMetric(float64(with)/float64(without), "ratio")
				b.ReportMetric(float64(with-without), "ns-added")
			})
		}
	}
}

// directWays are the ways of a connection past the node's rules.
var directWays = []struct {
	name    string
	connect func(*lab) time.Duration
}{
	{"forwarded", func(l *lab) time.Duration {
		return l.timeConnect(l.pods[0].ns, netip.AddrPortFrom(l.pods[1].addr, podPort))
	}},
	{"from-node", func(l *lab) time.Duration {
		return l.timeConnect(l.node, netip.AddrPortFrom(l.pods[1].addr, podPort))
	}},
}

// hookOnly writes the base chains without their rules, in the lab's node. One rule in a
// chain without jumps makes the kernel track connections.
func (l *lab) hookOnly() {
	l.must(netns.Set(l.node))
	f := nft.FamilyOf(l.family)
	table, err := nft.Open(f, tableName, nil)
	l.must(err)
	defer table.Close()
	table.ReplaceTable()
	chains := []nft.Chain{nft.NewChain("tracking", nil, nft.NewRule(nft.StateNew(), nft.Return()))}
	for _, c := range rulesetOf(f, 0, plan.Node{}).baseChains() {
		chains = append(chains, nft.NewChain(c.Name, c.Hook))
	}
	table.AddChains(chains)
	l.must(table.Commit())
}

// timeConnect is how long connect(2) takes from a namespace.
func (l *lab) timeConnect(from netns.NsHandle, to netip.AddrPort) time.Duration {
	l.must(netns.Set(from))
	family, sockaddr := unix.AF_INET, unix.Sockaddr(nil)
	if to.Addr().Is6() {
		family, sockaddr = unix.AF_INET6, &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
	} else {
		sockaddr = &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	l.must(err)
	defer unix.Close(fd)
	// A reset in place of TIME_WAIT, which would use up the ports.
	l.must(unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
	begin := time.Now()
	err = unix.Connect(fd, sockaddr)
	took := time.Since(begin)
	l.must(err)
	return took
}

func median(times []time.Duration) time.Duration {
	slices.Sort(times)
	return times[len(times)/2]
}
