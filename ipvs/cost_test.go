// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"context"
	"testing"
	"time"

	"signalbox/nftables"
	"signalbox/proxier"

	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// TestCost measures a first sync of 10,000 Services with 10 endpoints each, and the change of
// one endpoint, beside the nftables mode in the same kernel. It checks the number of messages;
// the log has the times.
func TestCost(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a minute on an emulated processor")
	}
	const services = 10_000
	eachFamily(t, func(t *testing.T, w world) {
		plan := conformance.Fleet(w.family, services, 10)
		p, sent := start(t, w.family, nil)
		nft, err := nftables.New(options(w.family))
		if err != nil {
			t.Fatal(err)
		}
		defer nft.Close()
		cold, one := figures(t, p, plan)
		nftCold, nftOne := figures(t, nft, plan)
		t.Logf("%d x 10 from nothing: ipvs %v, nftables %v, ratio %.2f", services, cold, nftCold, float64(cold)/float64(nftCold))
		t.Logf("one endpoint replaced: ipvs %v, nftables %v, ratio %.2f", one, nftOne, float64(one)/float64(nftOne))
		if n, want := len(sent.take()), services*11+2*rounds; n != want {
			t.Errorf("%d messages were sent, not %d", n, want)
		}
		again, sent := start(t, w.family, nil)
		began := time.Now()
		syncAll(t, again, plan)
		t.Logf("%d x 10 read back by a new process: %v, with %d messages that change something", services, time.Since(began), len(sent.take()))
	})
}

const rounds = 50

// figures returns the time of a full write, and the mean time to replace one endpoint. It
// restores the plan.
func figures(t *testing.T, p proxier.Proxier, desired *plan.Plan) (cold, one time.Duration) {
	t.Helper()
	began := time.Now()
	if err := p.Sync(context.Background(), desired, plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
	cold = time.Since(began)
	began = time.Now()
	for round := range rounds {
		sp := conformance.FleetService(desired.Family, 500, 5000+(round+1)%2, 10)
		desired.Services[sp.Name] = sp
		if err := p.Sync(context.Background(), desired, plan.Change{Services: []plan.ServicePortName{sp.Name}}); err != nil {
			t.Fatal(err)
		}
	}
	return cold, time.Since(began) / rounds
}
