// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"fmt"
	"net/netip"

	"signalbox/internal/netlab"
)

// ports are those on which Pods and nodes answer. Generated Services use the first two.
var serverPorts = []uint16{8080, 8081, 8082, 8083, 8084, 8085, 8086, 8087}

// pods are the Pods of each lab. Generated Services use the default ones; those of a
// dump use all, except pod-x, which is a client only.
var pods = func() []netlab.PodSpec {
	all := append([]netlab.PodSpec(nil), netlab.DefaultPods...)
	for i := range 6 {
		all = append(all, netlab.PodSpec{Name: fmt.Sprintf("pod-%d1", i), Node: "node1"}, netlab.PodSpec{Name: fmt.Sprintf("pod-%d2", i), Node: "node2"})
	}
	return all
}()

var labOptions = netlab.Options{Pods: pods, Ports: serverPorts}

// externalNetwork and balancerNetwork are for external and load-balancer IPs: there are
// as many as cluster IPs, so that no two cases share one.
var (
	externalNetwork = netlab.PrefixPair{V4: netip.MustParsePrefix("198.18.0.0/16"), V6: netip.MustParsePrefix("2001:db8:e::/112")}
	balancerNetwork = netlab.PrefixPair{V4: netip.MustParsePrefix("198.19.0.0/16"), V6: netip.MustParsePrefix("2001:db8:1b::/112")}
)

// vips are the virtual IPs that a case may use.
type vips struct{ cluster, external, balancer netlab.Pair }

// firstVIP leaves room for the addresses that the API server gives out first.
const firstVIP = 0x1000

func vipsOf(id int) vips {
	n := firstVIP + id
	return vips{netlab.ServiceNetwork.Nth(n), externalNetwork.Nth(n), balancerNetwork.Nth(n)}
}

// maxCases is how many virtual IPs there are. Markers have those above.
const maxCases = 0xe000 - firstVIP

func markerVIP(n int) netlab.Pair { return netlab.ServiceNetwork.Nth(0xe000 + n) }

// nodePortOf is the i-th of three NodePorts of a case. Cases of one batch share none.
func nodePortOf(id, i int) int32 { return int32(30000 + id%900*3 + i) }

// nodeOf is the node of a Pod, or the node itself.
func nodeOf(host string) string {
	for _, p := range pods {
		if p.Name == host {
			return p.Node
		}
	}
	return host
}

// hostAddr is the main address of a node or Pod.
func hostAddr(host string) netlab.Pair {
	switch host {
	case "node1":
		return netlab.NodeNetwork.Nth(11)
	case "node2":
		return netlab.NodeNetwork.Nth(12)
	}
	before := 0
	for _, p := range pods {
		if p.Name == host {
			break
		}
		if p.Node == nodeOf(host) {
			before++
		}
	}
	return netlab.NodePodNetwork(nodeOf(host)).Nth(10 + before)
}

// checkLayout compares what this file says with a lab.
func checkLayout(lab *netlab.Lab) error {
	for _, host := range append([]string{"node1", "node2"}, podNames()...) {
		if got := lab.Host(host).Addr; got != hostAddr(host) {
			return fmt.Errorf("%s has %v in the lab, not %v", host, got, hostAddr(host))
		}
	}
	return nil
}

func podNames() []string {
	var names []string
	for _, p := range pods {
		names = append(names, p.Name)
	}
	return names
}
