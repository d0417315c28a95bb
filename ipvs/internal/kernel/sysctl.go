// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"

	"signalbox/node"
	"signalbox/proxier/plan"
)

// sysctl is a kernel setting of the network namespace, and what does not work without it.
type sysctl struct{ name, value, without string }

func sysctls(family plan.Family, strictARP bool) []sysctl {
	list := []sysctl{
		// Masquerade needs connection tracking of what IPVS redirects.
		{"net/ipv4/vs/conntrack", "1", "source addresses are not rewritten, so that answers to some clients get lost"},
		// A connection to a removed destination ends at its next packet. So UDP
		// clients get another endpoint.
		{"net/ipv4/vs/expire_nodest_conn", "1", "UDP clients go on sending to endpoints that are gone"},
		{"net/ipv4/vs/expire_quiescent_template", "1", "clients that a kube-proxy remembered go on to endpoints that drain"},
	}
	if kernelBefore(5, 9) {
		// A client that reuses its port would wait a second.
		list = append(list, sysctl{"net/ipv4/vs/conn_reuse_mode", "0", "a client that uses its port again waits a second"})
	}
	if family == plan.IPv4 {
		list = append(list, sysctl{"net/ipv4/ip_forward", "1", "packets from elsewhere do not reach Pods"})
		if strictARP {
			const without = "every interface answers ARP for virtual addresses, in spite of --ipvs-strict-arp"
			list = append(list, sysctl{"net/ipv4/conf/all/arp_ignore", "1", without}, sysctl{"net/ipv4/conf/all/arp_announce", "2", without})
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

// SetSysctls sets the kernel settings that the mode needs, and returns those that it could not
// set. It skips settings that the kernel lacks.
func SetSysctls(family plan.Family, strictARP bool) (problems []*node.KernelProblem) {
	for _, s := range sysctls(family, strictARP) {
		if problem := node.SetSysctl(s.name, s.value, s.without); problem != nil && !errors.Is(problem, fs.ErrNotExist) {
			problems = append(problems, problem)
		}
	}
	return problems
}
