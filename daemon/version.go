package daemon

import (
	"context"
	"time"

	"signalbox/internal/buildinfo"
	"signalbox/internal/wait"
	"signalbox/source/apiserver"
)

// The API server is asked for its release again, as a cluster is upgraded while a
// node serves.
const (
	versionPeriod = 10 * time.Minute
	versionRetry  = 10 * time.Second
)

// reportVersion has the metrics tell which release of Kubernetes this is until ctx
// ends. A component that tells of another release than the API server makes the
// alert KubeVersionMismatch fire.
func (c *configRun) reportVersion(ctx context.Context) {
	report := c.observer.metrics.KubernetesVersion
	switch {
	case c.cfg.KubernetesVersion != "":
		report(c.cfg.KubernetesVersion)
	case c.client == nil:
		report(buildinfo.Release())
	default:
		c.followVersion(ctx, report)
	}
}

func (c *configRun) followVersion(ctx context.Context, report func(release string)) {
	for {
		pause := versionPeriod
		release, err := apiserver.Version(ctx, c.client)
		if err == nil {
			report(release)
		} else {
			c.log.Debug("the API server's version is not known; kubernetes_build_info stays as it is", "error", err)
			pause = versionRetry
		}
		if !wait.For(ctx, pause) {
			return
		}
	}
}
