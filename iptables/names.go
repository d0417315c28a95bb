package iptables

import (
	"crypto/sha256"
	"encoding/base32"
	"slices"
	"strconv"
	"strings"

	"signalbox/proxier/plan"
)

// table is an iptables table that this mode writes to.
type table uint8

const (
	nat table = iota
	filter
	tableCount
)

var tableNames = [tableCount]string{nat: "nat", filter: "filter"}

func (t table) String() string { return tableNames[t] }

// The chains that built-in chains jump to and those that other software calls.
const (
	servicesChain         = "KUBE-SERVICES"
	externalServicesChain = "KUBE-EXTERNAL-SERVICES"
	nodePortsChain        = "KUBE-NODEPORTS"
	forwardChain          = "KUBE-FORWARD"
	proxyFirewallChain    = "KUBE-PROXY-FIREWALL"
	postroutingChain      = "KUBE-POSTROUTING"
	markMasqChain         = "KUBE-MARK-MASQ"
	// firewallChain is shared with the kubelet: rules are added to it where
	// they are missing, and it is never removed.
	firewallChain = "KUBE-FIREWALL"
)

// fixedChains are the chains of each table that exist once.
var fixedChains = [tableCount][]string{
	nat:    {servicesChain, nodePortsChain, postroutingChain, markMasqChain},
	filter: {servicesChain, externalServicesChain, nodePortsChain, forwardChain, proxyFirewallChain},
}

// The prefixes of chains that belong to one ServicePort, followed by the hash
// of its name.
const (
	clusterPrefix  = "KUBE-SVC-" // an endpoint set
	localPrefix    = "KUBE-SVL-" // an endpoint set for outside traffic only
	externalPrefix = "KUBE-EXT-" // tells origins apart, marks for masquerade
	sourcesPrefix  = "KUBE-FW-"  // admits source ranges
	endpointPrefix = "KUBE-SEP-" // one endpoint
)

// servicePrefixes are all prefixes under which chains come and go, with those
// that earlier releases of kube-proxy used.
var servicePrefixes = []string{clusterPrefix, localPrefix, externalPrefix, sourcesPrefix, endpointPrefix, "KUBE-XLB-"}

func isServiceChain(name string) bool {
	return slices.ContainsFunc(servicePrefixes, func(p string) bool { return strings.HasPrefix(name, p) })
}

// hash is the part of a chain name after its prefix: 80 bits of SHA-256.
func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return base32.StdEncoding.EncodeToString(sum[:10])
}

// portHash tells the chains of one ServicePort from those of others. The first
// chain with a prefix has kube-proxy's name for it, so that a takeover replaces
// its contents in place; the others are numbered.
func portHash(n plan.ServicePortName, ordinal int) string {
	s := n.String() + n.Protocol.String()
	if ordinal > 0 {
		s += "#" + strconv.Itoa(ordinal)
	}
	return hash(s)
}

// endpointChain is also the name of the endpoint's list of clients. It is
// kube-proxy's, so that affinity survives a takeover in both directions.
func endpointChain(n plan.ServicePortName, e plan.Endpoint) string {
	return endpointPrefix + hash(n.String()+n.Protocol.String()+e.AddrPort.String())
}

// bucketChain is one part of the endpoint set that is too large for one chain.
func bucketChain(set string, bucket int) string {
	return clusterPrefix + hash(set+"/"+strconv.Itoa(bucket))
}

// comment is the match that carries text for people. Names come from
// manifests too, where nothing has checked them, and must not be able to end
// the quotation or the line.
func comment(text string) string {
	const limit = 240 // the kernel keeps 255 bytes
	if len(text) > limit {
		text = text[:limit]
	}
	clean := func(r rune) rune {
		if r < ' ' || r > '~' || r == '"' || r == '\\' {
			return '?'
		}
		return r
	}
	return ` -m comment --comment "` + strings.Map(clean, text) + `"`
}
