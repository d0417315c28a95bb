// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// CommonModules are patterns, as of path.Match, of the modules that the modes
// and the labs need. Each must match something: a kernel that lost a feature is
// not to go unnoticed. What is not loaded does not exist, as there is no
// modprobe.
var CommonModules = []string{
	"crc32c_generic", // libcrc32c, below SCTP and connection tracking, asks for it by an alias
	"nf_conntrack", "nf_conntrack_netlink", "nf_nat",
	"nf_tables", "nft_*", "nf_reject_*", "nf_log_syslog", "nf_tproxy_*", "nf_socket_*",
	"ip_tables", "iptable_*", "ipt_*", "ip6_tables", "ip6table_*", "ip6t_*", "xt_*",
	"ip_set", "ip_set_*", "ip_vs", "ip_vs_*",
	"veth", "bridge", "br_netfilter", "vxlan", "dummy", "8021q",
	"sctp", "sctp_diag", "tcp_diag", "udp_diag",
}

// module is one kernel module.
type module struct {
	name  string // with _ for every -
	file  string
	needs []string // names of modules that must be loaded before
}

// modules returns the modules that match patterns and all they need, each
// after what it needs. A Debian package holds no modules.dep, which its
// installation makes, so the modules themselves are asked.
func (k *Kernel) modules(patterns []string) ([]module, error) {
	all, err := k.allModules()
	if err != nil {
		return nil, err
	}
	builtin, err := k.builtin()
	if err != nil {
		return nil, err
	}
	o := ordering{all: all, done: map[string]bool{}}
	for _, pattern := range patterns {
		var matching []string
		for name := range all {
			if ok, err := path.Match(pattern, name); err != nil {
				return nil, fmt.Errorf("%q: %w", pattern, err)
			} else if ok {
				matching = append(matching, name)
			}
		}
		if len(matching) == 0 && !builtin[pattern] {
			return nil, fmt.Errorf("kernel %s has no module %s", k.Release, pattern)
		}
		slices.Sort(matching)
		for _, name := range matching {
			if err := o.add(name); err != nil {
				return nil, fmt.Errorf("kernel %s: %w", k.Release, err)
			}
		}
	}
	return o.order, nil
}

// ordering collects modules so that each comes after those it needs, which the
// kernel keeps free of circles.
type ordering struct {
	all   map[string]string // name -> file
	done  map[string]bool
	order []module
}

func (o *ordering) add(name string) error {
	if o.done[name] {
		return nil
	}
	o.done[name] = true
	file, ok := o.all[name]
	if !ok {
		return fmt.Errorf("there is no module %s", name)
	}
	m := module{name: name, file: file}
	var err error
	if m.needs, err = needs(file); err != nil {
		return err
	}
	for _, n := range m.needs {
		if err := o.add(n); err != nil {
			return fmt.Errorf("%s needs %s: %w", name, n, err)
		}
	}
	o.order = append(o.order, m)
	return nil
}

func (k *Kernel) allModules() (map[string]string, error) {
	all := map[string]string{}
	err := filepath.WalkDir(filepath.Join(k.Modules, "kernel"), func(file string, _ fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(file), ".ko"); ok {
			all[moduleName(name)] = file
		}
		return err
	})
	return all, err
}

// builtin returns the names of what could be a module, but is a part of the
// kernel.
func (k *Kernel) builtin() (map[string]bool, error) {
	text, err := os.ReadFile(filepath.Join(k.Modules, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	names := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		names[moduleName(strings.TrimSuffix(path.Base(strings.TrimSpace(line)), ".ko"))] = true
	}
	return names, nil
}

func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// needs reads what a module says of itself: NUL-terminated key=value pairs in
// an ELF section.
func needs(file string) ([]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	e, err := elf.NewFile(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	section := e.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("%s is not a kernel module", file)
	}
	info, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return dependencies(info), nil
}

func dependencies(info []byte) []string {
	var names []string
	for pair := range bytes.SplitSeq(info, []byte{0}) {
		list, ok := strings.CutPrefix(string(pair), "depends=")
		if !ok || list == "" {
			continue
		}
		for name := range strings.SplitSeq(list, ",") {
			names = append(names, moduleName(name))
		}
	}
	return names
}
