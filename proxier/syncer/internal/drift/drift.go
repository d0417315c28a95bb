// SPDX-License-Identifier: Apache-2.0

// Package drift decides when what other software changed in the kernel is repaired, and
// recognizes other software that undoes repairs.
package drift

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"signalbox/proxier"
)

const (
	// fightTime is for how long repairs are remembered.
	fightTime = time.Minute
	// fightRepairs is the number of repairs of one program's changes within fightTime
	// from which on the program counts as one that undoes repairs.
	fightRepairs = 5
	// firstPause and longestPause bound the pause between two repairs in a fight.
	firstPause   = time.Second
	longestPause = 30 * time.Second
	// restFactor makes repairs, each of which reads the kernel back, take at most a fifth
	// of one processor.
	restFactor = 4
	// ownNamePause is the wait before changes of a program with this program's name are
	// repaired: it may be a new signalbox, which is about to take the node over.
	ownNamePause = 15 * time.Second
)

// Repairs has the repairs of one IP family. Any goroutine may use it.
type Repairs struct {
	now     func() time.Time
	ownName string

	mu      sync.Mutex // guards what follows
	pending bool
	// unfinished: a repair has begun, or a full write in its place, and has not succeeded.
	unfinished bool
	due        time.Time
	writer     proxier.Writer // of the last change
	began      time.Time      // of the last repair
	notBefore  time.Time      // for the next repair
	past       []repair       // within fightTime
	pause      time.Duration  // 0 without a fight
}

type repair struct {
	at      time.Time
	program string
}

// New returns Repairs without a pending one.
func New() *Repairs {
	name, _ := os.ReadFile("/proc/self/comm") // without it, no program has this one's name
	return &Repairs{now: time.Now, ownName: strings.TrimSpace(string(name))}
}

// Request records that a process may have changed the kernel's state.
func (r *Repairs) Request(w proxier.Writer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.now()
	r.forget(now)
	due := now
	if w.Name != "" && w.Name == r.ownName {
		due = now.Add(ownNamePause)
	} else if n := len(r.past); r.pause > 0 {
		due = r.past[n-1].at.Add(r.pause)
	}
	if !r.pending || due.Before(r.due) {
		r.due = due
	}
	r.pending, r.writer = true, w
}

// RequestNow requests a repair that waits for nothing. Another process wrote until now, and
// further changes build on what this process wrote.
func (r *Repairs) RequestNow() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.pending {
		r.pending, r.writer = true, proxier.Writer{}
	}
	r.due, r.notBefore = r.now(), time.Time{}
}

// forget drops repairs from before fightTime, and ends the fight with the last of them.
func (r *Repairs) forget(now time.Time) {
	for len(r.past) > 0 && now.Sub(r.past[0].at) > fightTime {
		r.past = r.past[1:]
	}
	if len(r.past) == 0 {
		r.pause = 0
	}
}

// Due is the time of the pending repair, if there is one.
func (r *Repairs) Due() (at time.Time, pending bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.next(), r.pending
}

// next is the time of the pending repair.
func (r *Repairs) next() time.Time {
	if r.due.Before(r.notBefore) {
		return r.notBefore
	}
	return r.due
}

// Begin says whether a repair is due, and whose changes it repairs. Changes from now on
// are another repair's.
func (r *Repairs) Begin() (w proxier.Writer, due bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.pending || r.now().Before(r.next()) {
		return proxier.Writer{}, false
	}
	r.pending, r.unfinished, r.began = false, true, r.now()
	return r.writer, true
}

// End is called when a repair has ended, or nothing differed.
func (r *Repairs) End() {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.now()
	r.notBefore = now.Add(restFactor * now.Sub(r.began))
}

// Cancel is called before a full write, which repairs all changes so far.
func (r *Repairs) Cancel() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pending, r.unfinished = false, r.pending || r.unfinished
}

// Succeeded is called when the kernel has what was written.
func (r *Repairs) Succeeded() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unfinished = false
}

// Repaired records a repair. It returns the pause before the next one if the program has
// changed the kernel's state again and again, and whether that is new.
func (r *Repairs) Repaired(w proxier.Writer) (pause time.Duration, isNew bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.now()
	r.past = append(r.past, repair{now, w.Name})
	r.forget(now)
	same := 0
	for _, p := range r.past {
		if p.program == w.Name {
			same++
		}
	}
	isNew = r.pause == 0 && same >= fightRepairs
	switch {
	case isNew:
		r.pause = firstPause
	case r.pause > 0:
		r.pause = min(2*r.pause, longestPause)
	}
	return r.pause, isNew
}

// Condition says what is wrong at present, or "".
func (r *Repairs) Condition() string {
	if fight := r.Fight(); fight != "" {
		return fight
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.unfinished {
		return fmt.Sprintf("the process %s may have changed what signalbox has in the kernel; it is not repaired yet", r.writer)
	}
	if r.pending {
		return fmt.Sprintf("the process %s may have changed what signalbox has in the kernel; it is compared and repaired", r.writer)
	}
	return ""
}

// Fight says which program changes the kernel's state again and again, or "".
func (r *Repairs) Fight() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forget(r.now())
	if r.pause == 0 {
		return ""
	}
	return fmt.Sprintf("the program %s has changed what signalbox has in the kernel %d times within a minute; repairs wait %s", r.past[len(r.past)-1].name(), len(r.past), r.pause)
}

func (r repair) name() string { return proxier.Writer{Name: r.program}.Program() }
