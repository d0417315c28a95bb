// SPDX-License-Identifier: Apache-2.0

package service

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"signalbox/proxier/plan"
)

// maxWeightRules bounds what each endpoint is compared with.
const maxWeightRules = 1000

// weightRule is one entry of plan.AnnotationWeights.
type weightRule struct {
	addr   netip.Addr // not valid for an entry about names
	target string
	prefix bool // target is only how names begin
	weight uint16
}

// weightRules has the most exact rule first.
type weightRules []weightRule

// of returns what is said about an endpoint.
func (rules weightRules) of(addr netip.Addr, target string) (weight uint16, said bool) {
	i := slices.IndexFunc(rules, func(r weightRule) bool {
		switch {
		case r.addr.IsValid():
			return r.addr == addr
		case r.prefix:
			return strings.HasPrefix(target, r.target)
		}
		return r.target == target
	})
	if i < 0 {
		return 0, false
	}
	return rules[i].weight, true
}

// differ says whether any rule makes a difference that a mode without weights
// cannot make.
func (rules weightRules) differ() bool {
	return slices.ContainsFunc(rules, func(r weightRule) bool { return r.weight > 1 })
}

func (r weightRule) compare(o weightRule) int {
	rank := func(r weightRule) int {
		switch {
		case r.addr.IsValid():
			return 0
		case r.prefix:
			return 2
		}
		return 1
	}
	return cmp.Or(cmp.Compare(rank(r), rank(o)), r.addr.Compare(o.addr), cmp.Compare(len(o.target), len(r.target)), cmp.Compare(r.target, o.target))
}

func (r weightRule) sameSubject(o weightRule) bool { return r.compare(o) == 0 }

// readWeights leaves out what it cannot read, and the rest counts.
func readWeights(p *plan.Problems, obj metav1.Object) weightRules {
	text, field := obj.GetAnnotations()[plan.AnnotationWeights], plan.AnnotationField(plan.AnnotationWeights)
	var rules weightRules
	for entry := range strings.SplitSeq(text, ",") {
		if entry = strings.TrimSpace(entry); entry == "" {
			continue
		}
		if len(rules) == maxWeightRules {
			p.Add(field, "has more than %d entries; the others are left out", maxWeightRules)
			break
		}
		r, wrong := readWeight(entry)
		if wrong != "" {
			p.Add(field, "%.100q %s; the entry is left out", entry, wrong)
			continue
		}
		rules = append(rules, r)
	}
	slices.SortStableFunc(rules, weightRule.compare)
	for i := 1; i < len(rules); i++ {
		if rules[i].sameSubject(rules[i-1]) {
			p.Add(field, "names %.100q twice; the first entry counts", rules[i].subject())
		}
	}
	return slices.CompactFunc(rules, weightRule.sameSubject)
}

func (r weightRule) subject() string {
	switch {
	case r.addr.IsValid():
		return r.addr.String()
	case r.prefix:
		return r.target + "*"
	}
	return r.target
}

// readWeight reads "WHO=WEIGHT".
func readWeight(entry string) (r weightRule, wrong string) {
	who, text, found := strings.Cut(entry, "=")
	if !found {
		return r, "is not WHO=WEIGHT"
	}
	n, err := strconv.ParseUint(strings.TrimSpace(text), 10, 16)
	if err != nil {
		return r, "has no weight from 0 to 65535"
	}
	r.weight = uint16(n)
	who = strings.TrimSpace(who)
	if a, ok := ParseAddr(who); ok {
		r.addr = a
		return r, ""
	}
	r.target, r.prefix = strings.CutSuffix(who, "*")
	// How a name begins may end in what a name cannot end in.
	complete := r.target
	if r.prefix {
		complete += "x"
	}
	if len(validation.IsDNS1123Subdomain(complete)) > 0 {
		return r, "names neither an address nor a target"
	}
	return r, ""
}

// readScheduler checks no more than that the kernel can be asked for it.
func readScheduler(p *plan.Problems, obj metav1.Object) string {
	name, said := obj.GetAnnotations()[plan.AnnotationScheduler]
	if said && !ValidScheduler(name) {
		p.Add(plan.AnnotationField(plan.AnnotationScheduler), "%.100q is not a scheduler's name; the Service has the mode's own", name)
		return ""
	}
	return name
}

// ValidScheduler says whether name can be that of a scheduler of IPVS: the
// kernel has room for 15 characters and makes the name of a module of them.
func ValidScheduler(name string) bool {
	return name != "" && len(name) <= 15 && !strings.ContainsFunc(name, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '_'
	})
}

// SpreadsUnevenly says whether annotations ask for what takes a mode with
// schedulers.
func (t *Tracker) SpreadsUnevenly(name plan.ServiceName) bool {
	s := t.services[name]
	return s != nil && (s.scheduler != "" || s.weights.differ() ||
		slices.ContainsFunc(t.slices[name], func(s *endpointSlice) bool { return s.spreadsUnevenly }))
}
