package ipvs

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"

	"golang.org/x/sys/unix"

	"signalbox/node"
	"signalbox/proxier"
)

// setting is a kernel setting of the network namespace.
type setting struct{ name, value string }

// settings are what the mode needs of the kernel.
func (p *Proxier) settings() []setting {
	list := []setting{
		// Connection tracking follows what IPVS does, or masquerading could not.
		{"net/ipv4/vs/conntrack", "1"},
		// A connection whose destination was removed ends at its next packet,
		// so that UDP clients get another endpoint.
		{"net/ipv4/vs/expire_nodest_conn", "1"},
		{"net/ipv4/vs/expire_quiescent_template", "1"},
	}
	if kernelBefore(5, 9) {
		// A client that uses its port again would wait a second.
		list = append(list, setting{"net/ipv4/vs/conn_reuse_mode", "0"})
	}
	if p.Family == proxier.IPv4 {
		list = append(list, setting{"net/ipv4/ip_forward", "1"})
		if p.tuning.StrictARP {
			list = append(list, setting{"net/ipv4/conf/all/arp_ignore", "1"}, setting{"net/ipv4/conf/all/arp_announce", "2"})
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
	if err := p.makeSettings(); err != nil && !p.saidNoSettings {
		p.saidNoSettings = true
		slog.Warn("kernel settings of the ipvs mode cannot be made: masquerading and the removal of endpoints may not work as they should",
			"family", p.Family.String(), "error", err, "remedy", "run signalbox --init-only in a privileged container first")
	}
	t := &p.tuning
	if t.TCPTimeout == 0 && t.TCPFinTimeout == 0 && t.UDPTimeout == 0 {
		return nil
	}
	return p.kernel.setTimeouts(t.TCPTimeout, t.TCPFinTimeout, t.UDPTimeout)
}

// makeSettings leaves out what the kernel has not got.
func (p *Proxier) makeSettings() error {
	var failed []error
	for _, s := range p.settings() {
		if err := node.SetSysctl(s.name, s.value); err != nil && !errors.Is(err, fs.ErrNotExist) {
			failed = append(failed, err)
		}
	}
	return errors.Join(failed...)
}

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
