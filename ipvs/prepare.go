package ipvs

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"

	"golang.org/x/sys/unix"

	"signalbox/node"

	"signalbox/proxier/plan"
)

// setting is a kernel setting of the network namespace, and what does not work
// without it.
type setting struct{ name, value, without string }

// settings are what the mode needs of the kernel.
func (p *Proxier) settings() []setting {
	list := []setting{
		// Connection tracking follows what IPVS does, or masquerading could not.
		{"net/ipv4/vs/conntrack", "1", "source addresses are not rewritten, so that answers to some clients get lost"},
		// A connection whose destination was removed ends at its next packet,
		// so that UDP clients get another endpoint.
		{"net/ipv4/vs/expire_nodest_conn", "1", "UDP clients go on sending to endpoints that are gone"},
		{"net/ipv4/vs/expire_quiescent_template", "1", "clients that a kube-proxy remembered go on to endpoints that drain"},
	}
	if kernelBefore(5, 9) {
		// A client that uses its port again would wait a second.
		list = append(list, setting{"net/ipv4/vs/conn_reuse_mode", "0", "a client that uses its port again waits a second"})
	}
	if p.Family == plan.IPv4 {
		list = append(list, setting{"net/ipv4/ip_forward", "1", "packets from elsewhere do not reach Pods"})
		if p.tuning.StrictARP {
			const without = "every interface answers ARP for virtual addresses, in spite of --ipvs-strict-arp"
			list = append(list, setting{"net/ipv4/conf/all/arp_ignore", "1", without}, setting{"net/ipv4/conf/all/arp_announce", "2", without})
		}
	}
	return list
}

func kernelBefore(major, minor int) bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var a, b int
	if n, _ := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b); n != 2 {
		return false
	}
	return a < major || a == major && b < minor
}

// prepare makes the device and the kernel settings. Most works without the
// settings, so one that cannot be made is no reason to serve nothing.
func (p *Proxier) prepare() error {
	if err := p.device.ensure(); err != nil {
		return err
	}
	p.makeSettings()
	t := &p.tuning
	if t.TCPTimeout == 0 && t.TCPFinTimeout == 0 && t.UDPTimeout == 0 {
		return nil
	}
	return p.kernel.setTimeouts(t.TCPTimeout, t.TCPFinTimeout, t.UDPTimeout)
}

// makeSettings leaves out what the kernel has not got.
func (p *Proxier) makeSettings() {
	p.problems = nil
	for _, s := range p.settings() {
		if problem := node.SetSysctl(s.name, s.value, s.without); problem != nil && !errors.Is(problem, fs.ErrNotExist) {
			p.problems = append(p.problems, problem)
		}
	}
}

// KernelProblems implements proxier.Proxier, for the last Sync that wrote everything.
func (p *Proxier) KernelProblems() []*node.KernelProblem { return p.problems }

// read makes the state of what is in the kernel and this mode's: virtual
// servers at addresses of the device or with a mark of this mode, whoever made
// them; no others.
func (p *Proxier) read(rules *ruleset) (*state, error) {
	st := newState(rules)
	var err error
	if st.held, st.others, err = p.device.held(); err != nil {
		return nil, err
	}
	all, err := p.kernel.servers()
	if err != nil {
		return nil, err
	}
	listed, err := p.kernel.allDests()
	if err != nil {
		slog.Warn("ipvs: cannot read the list of all destinations; asking for those of each virtual server, which takes longer",
			"family", p.Family.String(), "error", err)
		listed = nil
	}
	for key, s := range all {
		if !isOurs(key.mark) && !st.held[key.addr] {
			continue
		}
		dests := listed[key]
		if len(dests) == 0 {
			if dests, err = p.kernel.dests(key); err != nil {
				return nil, err
			}
		}
		s.dests = make(map[netip.AddrPort]int, len(dests))
		st.addServer(key, s)
		for _, d := range dests {
			s.dests[d.addr] = d.weight
			st.noteEndpoint(key, d.addr)
		}
	}
	st.keepDeadlines(p.deadlines)
	return st, nil
}
