// SPDX-License-Identifier: Apache-2.0

package plan

import "fmt"

// Reason says why a decision about a Service was made. Package service decides, and
// `signalbox explain` prints the reasons.
type Reason uint8

// NoReason is the zero value: no decision was made.
const NoReason Reason = iota

// Reasons about an endpoint. With the first two it gets new connections.
const (
	Ready Reason = iota + 1
	Terminating
	NotReady
	NotServing
	TerminatingUnused
	WeightZero
	OtherNode
	OtherZoneHint
	OtherNodeHint
)

// Reasons why a Service port uses no endpoint of an EndpointSlice.
const (
	NoSuchPort Reason = iota + 32
	OtherFamily
)

// Reasons why topology hints of one kind count or not.
const (
	HintsUsed Reason = iota + 64
	HintsMissing
	HintsElsewhere
	PlaceUnknown
)

// Reasons why a traffic policy applies.
const (
	PolicyCluster Reason = iota + 96
	PolicyLocal
	ShortWay
	LocalFallback
	APIServer
	APIServerHost
)

// Reasons why a Service is not served.
const (
	NoService Reason = iota + 128
	OtherProxy
	ExternalName
	Headless
	NoClusterIP
	InvalidName
	NoAddressOfFamily
	TooLarge
	NoPort
)

// Reasons why a Service is not served at one of its addresses.
const (
	ExternalIPsOff Reason = iota + 160
	ExternalIPNotAllowed
	LoadBalancerAnswers
)

// reasonTexts has a name for programs and words for people.
var reasonTexts = map[Reason]struct{ name, text string }{
	Ready:             {"Ready", "ready"},
	Terminating:       {"Terminating", "terminating and still serving, while no endpoint is ready"},
	NotReady:          {"NotReady", "not ready"},
	NotServing:        {"NotServing", "terminating and no longer serving"},
	TerminatingUnused: {"TerminatingUnused", "terminating, while others are ready"},
	WeightZero:        {"WeightZero", "of weight 0"},
	OtherNode:         {"OtherNode", "not on this node"},
	OtherZoneHint:     {"OtherZoneHint", "meant for other zones by its hints"},
	OtherNodeHint:     {"OtherNodeHint", "meant for other nodes by its hints"},

	NoSuchPort:  {"NoSuchPort", "the slice has no port with this name and protocol"},
	OtherFamily: {"OtherFamily", "the slice has addresses of the other IP family"},

	HintsUsed:      {"HintsUsed", "used"},
	HintsMissing:   {"HintsMissing", "not used, because ready endpoints have none"},
	HintsElsewhere: {"HintsElsewhere", "not used, because none of them is for this place"},
	PlaceUnknown:   {"PlaceUnknown", "not used, because the Node object does not say where this node is"},

	PolicyCluster: {"PolicyCluster", "the traffic policy is Cluster"},
	PolicyLocal:   {"PolicyLocal", "the traffic policy is Local"},
	ShortWay:      {"ShortWay", "externalTrafficPolicy Local does not apply to this node's own Pods and processes"},
	LocalFallback: {"LocalFallback", "the traffic policy is Local, but no endpoint is on this node, and --ipvs-kube-proxy-policies allows others"},
	APIServer:     {"APIServer", "the address and port are the API server's: processes of this node connect to it past the Service"},
	APIServerHost: {"APIServerHost", "the address is an API server's, and this mode leaves packets to it alone"},

	NoService:         {"NoService", "signalbox knows no such Service"},
	OtherProxy:        {"OtherProxy", "its label service.kubernetes.io/service-proxy-name hands it to another proxy"},
	ExternalName:      {"ExternalName", "its type is ExternalName, which DNS alone serves"},
	Headless:          {"Headless", "it is headless: clusterIP is None, and clients connect to its endpoints"},
	NoClusterIP:       {"NoClusterIP", "it has no cluster IP yet"},
	InvalidName:       {"InvalidName", "its name is not one that the API allows"},
	NoAddressOfFamily: {"NoAddressOfFamily", "it has no cluster IP of this IP family"},
	TooLarge:          {"TooLarge", "it is too large"},
	NoPort:            {"NoPort", "it has no port that can be served"},

	ExternalIPsOff:       {"ExternalIPsOff", "external IPs are switched off by the feature gate AllowServiceExternalIPs"},
	ExternalIPNotAllowed: {"ExternalIPNotAllowed", "this external IP is in no range of --external-ip-cidrs"},
	LoadBalancerAnswers:  {"LoadBalancerAnswers", "the load balancer itself answers there (ipMode: Proxy)"},
}

// String returns a name that does not change, for programs.
func (r Reason) String() string {
	if t, known := reasonTexts[r]; known {
		return t.name
	}
	return fmt.Sprintf("reason-%d", uint8(r))
}

// Text returns words for a sentence.
func (r Reason) Text() string { return reasonTexts[r].text }
