// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"testing"
	"time"
)

func TestGoneTargetsAreFoundForAWhile(t *testing.T) {
	ts := &targets{byID: map[frontendID]*target{}, gone: map[frontendID]goneTarget{}}
	now := time.Now()
	added := ts.announce([]*target{{id: 1}, {id: 2}})
	if len(added) != 2 || ts.announce([]*target{{id: 1}}) != nil {
		t.Error("announce added what was there, or did not add what was new")
	}
	ts.put(nil, []frontendID{1}, now)
	if ts.find(1, false) != nil || ts.find(1, true) == nil {
		t.Error("a frontend that has gone must be found for late connections, and for nothing else")
	}
	ts.expire(now.Add(handshakeTime + 1))
	if ts.find(1, true) != nil || ts.find(2, false) == nil {
		t.Error("a frontend is found after its time, or another one is not")
	}
}
